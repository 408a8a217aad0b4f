// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A place on the file system where the API listens.
//!
//! A socket file outlives the process that made it. One that nobody listens on is replaced; one that answers belongs
//! to another daemon and is never taken from it; a file that is no socket is never removed.
//!
//! The API may move a disk away, so its socket is the owner's alone (0600). The mode is set on the socket *before* it
//! is bound: Linux gives the file the mode of the socket. A chmod after the bind would leave a moment in which
//! everybody may connect, and a umask would change the whole process while other threads create files.

use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use thiserror::Error;
use tokio::net::{UnixListener, UnixSocket};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 64;

/// Why the API cannot listen at a path.
#[derive(Debug, Error)]
pub enum BindError {
    /// Another process answers there.
    #[error("{0} is in use: another daemon answers there")]
    Live(PathBuf),
    /// There is a file of another kind.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Removes the socket file when dropped, if it is still the one that was made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// What tells one file from another. Inode numbers are used again at once, hence the time of birth; the time of the
/// last change would differ after an operator's chgrp.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino(), metadata.created().ok())
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|there| identity(&there) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Listens at `path` with mode 0600. Must be called inside a tokio runtime. Keep the [`SocketFile`] as long as the
/// listener serves.
///
/// # Errors
/// [`BindError`]: somebody else listens there, the path is taken by another file, or the system refused.
pub fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    make_room(path)?;
    let io = |source| BindError::Io { path: path.to_owned(), source };
    let socket = UnixSocket::new_stream().map_err(io)?;
    let descriptor = socket.as_fd().try_clone_to_owned().map_err(io)?;
    File::from(descriptor).set_permissions(Permissions::from_mode(0o600)).map_err(io)?;
    socket.bind(path).map_err(io)?;
    let listener = socket.listen(BACKLOG).map_err(io)?;
    let made = fs::symlink_metadata(path).map_err(io)?;
    Ok((listener, SocketFile { path: path.to_owned(), identity: identity(&made) }))
}

/// Removes a stale socket file; refuses everything else that is there.
fn make_room(path: &Path) -> Result<(), BindError> {
    let io = |source| BindError::Io { path: path.to_owned(), source };
    let there = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
    };
    if !there.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match StdUnixStream::connect(path) {
        Ok(_) => Err(BindError::Live(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io),
        Err(error) => Err(io(error)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn socket_is_private_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (listener, file) = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn stale_socket_is_replaced_and_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (listener, file) = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(BindError::Live(_))));
        drop(listener);
        let (_second, _second_file) = bind(&path).unwrap();
        drop(file);
        assert!(path.exists(), "the first one's guard must not remove the second one's file");
    }

    #[tokio::test]
    async fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        fs::write(&path, b"precious").unwrap();
        assert!(matches!(bind(&path), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
