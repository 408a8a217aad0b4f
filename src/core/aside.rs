// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a session carries beside its state.
//!
//! Two sessions are the same if they will do the same, whatever comes. Counters that are only shown do not belong
//! to that, and neither do times: that a timer runs is state, when it fires is the clock's affair, since nothing in
//! the protocol may depend on which of two timers is first. A search through all states (`tests/model`) would find no
//! end if these told states apart.

use std::hash::{Hash, Hasher};
use std::ops::{Deref, DerefMut};

/// A value that is no part of what a session is: all values are equal and hash alike.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::core) struct Aside<T>(pub(in crate::core) T);

impl<T> PartialEq for Aside<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Aside<T> {}

impl<T> Hash for Aside<T> {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl<T> Deref for Aside<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Aside<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// A time on the session's clock at which something is due, in an `Option` when it may not run.
pub(in crate::core) type Due = Aside<std::time::Duration>;
