// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Acknowledgements that the hypervisor waits for.
//!
//! A vhost-user front-end stops, and the guest with it, until GET_VRING_BASE or SET_VRING_ENABLE is answered. That makes them
//! the barriers of a handoff. At most one of each can be pending, since a front-end has one message under way;
//! a newer one replaces an older one, whose sender has given up.

use super::signals::answer;
use crate::frontend::signal::{Envelope, Verdict};

/// The pending acknowledgements.
#[derive(Default)]
pub(super) struct Holds {
    stop: Option<Envelope>,
    start: Option<Envelope>,
}

impl Holds {
    /// Keeps the acknowledgement of the rings' stop.
    pub(super) fn hold_stop(&mut self, envelope: Envelope) {
        self.stop = Some(envelope);
    }

    /// Keeps the acknowledgement of a ring start.
    pub(super) fn hold_start(&mut self, envelope: Envelope) {
        self.start = Some(envelope);
    }

    /// Lets the acknowledgement of the stop go out, if one is pending.
    pub(super) fn answer_stop(&mut self) {
        if let Some(envelope) = self.stop.take() {
            answer(envelope, Verdict::Proceed);
        }
    }

    /// Answers a pending ring start.
    pub(super) fn answer_start(&mut self, verdict: Verdict) {
        if let Some(envelope) = self.start.take() {
            answer(envelope, verdict);
        }
    }
}
