// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The volume is made larger while the guest runs.
//!
//! A peer knows the size from the greeting on, and a chunk that only one side has cannot be handed over. So a volume
//! grows only where it is served and no migration is armed, and while it grows none is armed. It takes a sync of the
//! layer, so it is a job; the guest notices nothing until it is told of the new size.

use super::admission::{self, Admission};
use super::node::Node;
use super::status::Denied;
use crate::core::geometry::GeometryError;
use crate::store::GrowError;
use tokio::sync::oneshot;

/// Where the outcome of a command goes.
type Answer = oneshot::Sender<Result<(), Denied>>;

impl Node {
    /// Begins to make the volume larger, or refuses at once.
    pub(super) fn resize(&mut self, size: u64, answer: Answer) {
        let denied = match admission::resize(self.standing()) {
            Admission::Deny(denied) => Some(denied),
            Admission::Accept if self.resizing.is_some() => {
                Some(Denied::new("busy", "the volume is being resized: ask again"))
            }
            Admission::Accept if self.lost_chunks() > 0 => Some(admission::not_whole(self.lost_chunks())),
            Admission::Accept => self.volume.fault().map(|fault| Denied::new("faulty", fault)),
        };
        match denied {
            // A client that went away does not want the answer.
            Some(denied) => drop(answer.send(Err(denied))),
            None => {
                self.resizing = Some(answer);
                self.jobs.grow(size);
            }
        }
    }

    /// The volume has grown, or not.
    pub(super) fn on_resized(&mut self, result: Result<(), GrowError>) {
        let size = self.volume.geometry().size();
        match &result {
            Ok(()) => {
                log::info!("the volume has {size} bytes");
                self.frontend.capacity_changed(size);
            }
            Err(error) => log::warn!("the volume keeps its {size} bytes: {error}"),
        }
        if let Some(answer) = self.resizing.take() {
            drop(answer.send(result.map_err(|error| Denied::new(code(&error), error.to_string()))));
        }
        self.publish();
    }
}

/// The word for a growth that was refused or failed.
fn code(error: &GrowError) -> &'static str {
    match error {
        GrowError::Shrink { .. } => "shrink",
        GrowError::Geometry(GeometryError::TooManyChunks(_)) => "limit",
        GrowError::Geometry(GeometryError::Size(_) | GeometryError::ChunkSize(_)) => "invalid",
        GrowError::Extend { source, .. } => match source.raw_os_error() {
            Some(libc::EFBIG) => "limit",
            Some(libc::ENOSPC | libc::EDQUOT) => "no-space",
            _ => "internal",
        },
        GrowError::Sync(_) | GrowError::Store(_) => "internal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_file_system_refuses_has_a_name() {
        for (errno, wanted) in [
            (libc::EFBIG, "limit"),
            (libc::ENOSPC, "no-space"),
            (libc::EDQUOT, "no-space"),
            (libc::EIO, "internal"),
        ] {
            let source = std::io::Error::from_raw_os_error(errno);
            assert_eq!(code(&GrowError::Extend { path: "layer".into(), source }), wanted);
        }
    }
}
