// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An executor of one thread: tasks run in the order in which they were woken for the last time, none before it is woken.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Task<T> {
    flag: Arc<Flag>,
    future: Pin<Box<dyn Future<Output = T>>>,
}

/// The tasks of one daemon; dropping them ends them as a kill does.
pub(crate) struct Tasks<T> {
    tasks: VecDeque<Task<T>>,
}

impl<T> Default for Tasks<T> {
    fn default() -> Self {
        Self { tasks: VecDeque::new() }
    }
}

impl<T> Tasks<T> {
    pub(crate) fn spawn(&mut self, future: impl Future<Output = T> + 'static) {
        self.tasks.push_back(Task { flag: Arc::new(Flag(AtomicBool::new(true))), future: Box::pin(future) });
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.tasks.iter().any(|task| task.flag.0.load(Ordering::SeqCst))
    }

    /// Polls every task that was woken, once; the results of those that have ended.
    pub(crate) fn run(&mut self) -> Vec<T> {
        let mut ended = Vec::new();
        for _ in 0..self.tasks.len() {
            let Some(mut task) = self.tasks.pop_front() else { break };
            if task.flag.0.swap(false, Ordering::SeqCst) {
                let waker = Waker::from(Arc::clone(&task.flag));
                if let Poll::Ready(result) = task.future.as_mut().poll(&mut Context::from_waker(&waker)) {
                    ended.push(result);
                    continue;
                }
            }
            self.tasks.push_back(task);
        }
        ended
    }
}
