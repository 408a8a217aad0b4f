// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What two peers of different age may say to each other: a pure function of what both offer.
//!
//! Both sides run it on the same two preambles, so both come to the same result without another round trip. The
//! version changes when the meaning of a message changes; a feature bit stands for messages that may be left out.
//! A single version number was rejected: hosts of a cluster are upgraded one after the other, and disks move
//! between them all the while.

use thiserror::Error;

/// Oldest version of the protocol that this build speaks.
pub const OLDEST_VERSION: u16 = 1;
/// Newest version of the protocol that this build speaks.
pub const NEWEST_VERSION: u16 = 1;

/// A set of optional parts of the protocol, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Features(pub u64);

impl Features {
    /// The messages `Replica` and `Keep`: a disk that comes back finds what it left.
    pub const REPLICA: Self = Self(1);

    /// Whether all of `wanted` are in the set.
    #[must_use]
    pub fn has(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// Versions `min..=max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VersionRange {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

/// What one side speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Terms {
    /// Its versions.
    pub versions: VersionRange,
    /// Features that it can do.
    pub offered: Features,
    /// Features without which it does not talk.
    pub required: Features,
}

impl Terms {
    /// What this build speaks.
    pub const OURS: Self = Self {
        versions: VersionRange { min: OLDEST_VERSION, max: NEWEST_VERSION },
        offered: Features::REPLICA,
        required: Features(0),
    };
}

/// What both speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Agreed {
    /// The newest common version.
    pub version: u16,
    /// The common features.
    pub features: Features,
}

/// Why two peers cannot talk.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum NegotiateError {
    /// The other side's range of versions is empty.
    #[error("the peer offers protocol versions {min} to {max}, which is no range")]
    EmptyRange {
        /// Its oldest.
        min: u16,
        /// Its newest.
        max: u16,
    },
    /// The other side is too old.
    #[error("the peer speaks protocol versions up to {theirs}, this daemon from {ours} on: upgrade the peer")]
    PeerTooOld {
        /// Its newest.
        theirs: u16,
        /// Our oldest.
        ours: u16,
    },
    /// The other side is too new.
    #[error(
        "the peer speaks protocol versions from {theirs} on, this daemon up to {ours}: upgrade this daemon"
    )]
    PeerTooNew {
        /// Its oldest.
        theirs: u16,
        /// Our newest.
        ours: u16,
    },
    /// The other side cannot do what this side needs.
    #[error("the peer lacks protocol features {0:#x}, which this daemon requires")]
    PeerLacks(u64),
    /// The other side needs what this side cannot do.
    #[error("the peer requires protocol features {0:#x}, which this daemon lacks")]
    PeerRequires(u64),
}

/// The newest common version and the common features.
///
/// # Errors
/// A [`NegotiateError`] that says which side has to change.
pub fn negotiate(ours: &Terms, theirs: &Terms) -> Result<Agreed, NegotiateError> {
    let VersionRange { min, max } = theirs.versions;
    if min > max {
        return Err(NegotiateError::EmptyRange { min, max });
    }
    if max < ours.versions.min {
        return Err(NegotiateError::PeerTooOld { theirs: max, ours: ours.versions.min });
    }
    if min > ours.versions.max {
        return Err(NegotiateError::PeerTooNew { theirs: min, ours: ours.versions.max });
    }
    let lacks = ours.required.0 & !theirs.offered.0;
    if lacks != 0 {
        return Err(NegotiateError::PeerLacks(lacks));
    }
    let requires = theirs.required.0 & !ours.offered.0;
    if requires != 0 {
        return Err(NegotiateError::PeerRequires(requires));
    }
    Ok(Agreed { version: max.min(ours.versions.max), features: Features(ours.offered.0 & theirs.offered.0) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn terms(min: u16, max: u16, offered: u64, required: u64) -> Terms {
        Terms {
            versions: VersionRange { min, max },
            offered: Features(offered),
            required: Features(required),
        }
    }

    #[test]
    fn each_refusal_says_who_has_to_change() {
        let ours = terms(2, 3, 0b11, 0b01);
        assert_eq!(
            negotiate(&ours, &terms(3, 2, 0b11, 0)),
            Err(NegotiateError::EmptyRange { min: 3, max: 2 })
        );
        assert_eq!(
            negotiate(&ours, &terms(1, 1, 0b11, 0)),
            Err(NegotiateError::PeerTooOld { theirs: 1, ours: 2 })
        );
        assert_eq!(
            negotiate(&ours, &terms(4, 9, 0b11, 0)),
            Err(NegotiateError::PeerTooNew { theirs: 4, ours: 3 })
        );
        assert_eq!(negotiate(&ours, &terms(1, 9, 0b10, 0)), Err(NegotiateError::PeerLacks(0b01)));
        assert_eq!(negotiate(&ours, &terms(1, 9, 0b111, 0b100)), Err(NegotiateError::PeerRequires(0b100)));
        let agreed = Agreed { version: 3, features: Features(0b01) };
        assert_eq!(negotiate(&ours, &terms(1, 9, 0b101, 0b001)), Ok(agreed));
    }

    proptest! {
        #[test]
        fn both_sides_come_to_the_same(
            a in (0u16..6, 0u16..6, 0u64..8, 0u64..8),
            b in (0u16..6, 0u16..6, 0u64..8, 0u64..8),
        ) {
            let (a, b) = (terms(a.0, a.0 + a.1, a.2, a.3), terms(b.0, b.0 + b.1, b.2, b.3));
            let (one, other) = (negotiate(&a, &b), negotiate(&b, &a));
            prop_assert_eq!(one.ok(), other.ok());
            if let Ok(agreed) = one {
                prop_assert!((a.versions.min..=a.versions.max).contains(&agreed.version));
                prop_assert!((b.versions.min..=b.versions.max).contains(&agreed.version));
            }
        }
    }
}
