// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages as bytes (layer L1): [`frame`] says where a message begins and ends and that it is whole, [`codec`] what
//! it says, [`negotiate`] what two peers of different age may say to each other. docs/protocol.md has the tables.
//!
//! Everything here is a pure function of its bytes: the transport reads and writes, this layer never does. All that
//! a decoder sees comes from a stranger, so it is total (an error, never a panic), checks every length before it
//! allocates, and takes exactly one encoding of each message, so that what was decoded encodes to the same bytes
//! again. Numbers are little-endian. A serialisation framework was rejected: the bytes are a contract between
//! versions, and a derive macro hides when it is broken.

#![forbid(unsafe_code)]

pub mod codec;
pub mod frame;
pub mod negotiate;

use thiserror::Error;

/// Why bytes are not a message, by name.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum WireError {
    /// The bytes end before the message does.
    #[error("incomplete: {needed} bytes are needed")]
    Incomplete {
        /// Bytes from the start of the frame that are needed to go on; the frame may turn out to be longer.
        needed: usize,
    },
    /// The connection does not begin as a connection of this protocol does.
    #[error("this is no blkferry peer (its first bytes are others)")]
    Magic,
    /// A checksum does not match.
    #[error("the checksum of a {what} does not match")]
    Checksum {
        /// What it covers.
        what: &'static str,
    },
    /// A number that this version does not know.
    #[error("unknown {what} {number}")]
    Unknown {
        /// What the number says.
        what: &'static str,
        /// The number.
        number: u64,
    },
    /// A length, or a count of entries, above its limit.
    #[error("{what} is too long: {len}, at most {limit} are allowed")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// A payload ends inside a field.
    #[error("a {what} message ends inside a field")]
    Short {
        /// The message.
        what: &'static str,
    },
    /// Bytes are left after the last field.
    #[error("a {what} message has {extra} bytes after its last field")]
    Trailing {
        /// The message.
        what: &'static str,
        /// How many.
        extra: usize,
    },
    /// A field has a value that it must not have.
    #[error("{what} has a value that is not allowed")]
    Value {
        /// The field.
        what: &'static str,
    },
    /// A message that may not travel on this kind of stream.
    #[error("a {what} message may not travel on a data stream")]
    Misplaced {
        /// The message.
        what: &'static str,
    },
}
