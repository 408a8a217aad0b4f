// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue thread's engine on a simulated disk.

use super::{Files, SimFile};
use crate::engine::{Completion, Event, FileId, Op};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// The twin of `UringEngine`: it never sleeps, for time is the disk's. Descriptors are not polled: whoever drives it
/// looks itself.
#[derive(Debug, Default)]
pub struct SimQueue {
    files: Files,
    queued: Vec<(u64, Op)>,
    done: Arc<Mutex<VecDeque<Completion>>>,
    in_flight: u32,
}

impl SimQueue {
    pub(in crate::engine) fn register(&mut self, file: &SimFile) -> FileId {
        self.files.add(file)
    }

    pub(in crate::engine) fn submit(&mut self, tag: u64, op: Op) {
        self.in_flight += 1;
        self.queued.push((tag, op));
    }

    /// Starts what is queued.
    pub(in crate::engine) fn enter(&mut self) {
        for (tag, op) in self.queued.drain(..) {
            let done = Arc::clone(&self.done);
            match self.files.get(op.file()) {
                Some(file) => file.start(tag, op, Box::new(move |ended| done.lock().push_back(ended))),
                None => {
                    let result = Err(io::Error::new(io::ErrorKind::InvalidInput, "a file of another engine"));
                    done.lock().push_back(Completion { tag, result, op });
                }
            }
        }
    }

    pub(in crate::engine) fn next(&mut self) -> Option<Event> {
        let done = self.done.lock().pop_front()?;
        self.in_flight -= 1;
        Some(Event::Done(done))
    }

    pub(in crate::engine) fn has_news(&self) -> bool {
        !self.done.lock().is_empty()
    }

    /// Operations under way; none of a process that is gone will end.
    pub(in crate::engine) fn in_flight(&self) -> u32 {
        let dead = self.files.get(FileId(0)).is_some_and(|file| file.disk().is_dead());
        if dead { 0 } else { self.in_flight }
    }
}
