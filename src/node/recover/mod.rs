// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operator's way out when a side is lost for good: explains what a state directory holds, without a daemon and
//! without changing it, and makes a side the owner of its disk by force.
//!
//! What may be forced is `core::takeover`'s table; what it costs is put in words here, from what the directory really
//! holds, before it is done and after. Nobody is made an owner without having been told the price: the caller asks for
//! the explanation first, and for the deed only when the operator has accepted it.

mod report;
mod words;

pub use report::{BaseReport, Choice, Explanation, ForceReport, ForcedReport, LayerReport, MissingReport};

use crate::config::CacheMode;
use crate::core::message::{Epoch, MigrationId, VolumeId};
use crate::core::record::{DestinationStage, MigrationRecord, Role, SourceStage};
use crate::core::takeover::{LostChunks, Takeover, Was, forced_epoch, takeover};
use crate::store::{
    Forced, Look, Missing, StateDir, Store, StoreError, StoreParams, TakeOver, look, look_in, utc,
};
use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// Why nothing was explained or forced.
#[derive(Debug, Error)]
pub enum RecoverError {
    /// The directory cannot be used: foreign, torn, in use, or unreadable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It may not be forced.
    #[error("nothing was changed: {text}")]
    Refused {
        /// A stable word: `owner`, `nothing`, `torn`, `no-base`.
        code: &'static str,
        /// Why, and what to do.
        text: String,
    },
}

impl RecoverError {
    /// A stable word, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused { code, .. } => code,
            Self::Store(StoreError::InUse { .. }) => "in-use",
            Self::Store(StoreError::Foreign { .. }) => "foreign",
            Self::Store(StoreError::Corrupt { .. }) => "damaged",
            Self::Store(StoreError::Version { .. }) => "version",
            Self::Store(StoreError::NoVolume { .. }) => "empty",
            Self::Store(StoreError::Base(_) | StoreError::Mismatch { .. }) => "base",
            Self::Store(_) => "unreadable",
        }
    }
}

/// What a directory holds, in the words that everything else here is made of.
struct Facts {
    look: Look,
    missing: Missing,
    volume: VolumeId,
    epoch: Epoch,
    role: Option<Role>,
    /// Another boot of the host has passed since.
    rebooted: bool,
}

impl Facts {
    fn of(look: Look) -> Result<Self, StoreError> {
        let missing = Missing::of(&look.superblock.geometry()?, &look.runs);
        let (volume, epoch, role) = match &look.record {
            Some((MigrationRecord::V1 { volume, epoch, role }, _)) => (*volume, *epoch, Some(role.clone())),
            None => (look.superblock.volume, Epoch(0), None),
        };
        let rebooted =
            look.recovered.host_crashed || look.record.as_ref().is_some_and(|(_, same_boot)| !same_boot);
        Ok(Self { look, missing, volume, epoch, role, rebooted })
    }

    fn takeover(&self) -> Takeover {
        takeover(self.role.as_ref())
    }

    fn migration(&self) -> Option<MigrationId> {
        match &self.role {
            Some(Role::Source(source)) => Some(source.migration),
            Some(Role::Destination(destination)) => Some(destination.migration),
            Some(Role::Serving | Role::Idle) | None => None,
        }
    }

    /// Whether the source has synced its layer since the handoff, where that matters.
    fn source_synced(&self) -> Option<bool> {
        match &self.role {
            Some(Role::Source(source)) => match source.stage {
                SourceStage::Relinquished { synced } => Some(synced),
                SourceStage::Pushing | SourceStage::Offered | SourceStage::Released { .. } => None,
            },
            Some(Role::Destination(destination)) => match destination.stage {
                DestinationStage::Active { source_synced } => Some(source_synced),
                DestinationStage::Receiving | DestinationStage::Prepared | DestinationStage::Complete => None,
            },
            Some(Role::Serving | Role::Idle) | None => None,
        }
    }

    /// What is to be forced, or why not.
    fn decide(&self, lost: LostChunks) -> Result<Option<Was>, RecoverError> {
        let refuse = |code, text: String| Err(RecoverError::Refused { code, text });
        if lost == LostChunks::Base && self.look.superblock.base.length == 0 {
            return refuse("no-base", "this volume has no base image: say --lost-chunks zero".to_owned());
        }
        match self.takeover() {
            Takeover::Possible(was) => Ok(Some(was)),
            Takeover::Owner if self.missing.chunks > 0 && lost != LostChunks::Error => Ok(None),
            Takeover::Owner => refuse("owner", words::owner(self)),
            Takeover::Nothing => refuse("nothing", words::NOTHING.to_owned()),
            Takeover::Torn => refuse("torn", words::torn(self)),
        }
    }
}

/// Explains a state directory, and what would be lost if it were made the owner and lost blocks became `lost`. `base` is
/// where the base image is, if that is not where it was. Nothing is changed.
///
/// # Errors
/// [`RecoverError::Store`], by the names that a daemon would give: also that a daemon runs.
pub fn explain(dir: &Path, base: Option<&str>, lost: LostChunks) -> Result<Explanation, RecoverError> {
    let facts = Facts::of(look(dir)?)?;
    Ok(report::explanation(dir, &facts, base, lost))
}

/// Makes a directory's side the owner of the disk, or, where it is already, settles what it has lost. Returns how
/// things stand after that. Blocks for several syncs.
///
/// # Errors
/// [`RecoverError`]: `Refused` means that nothing was changed; after `Store` call it again.
pub fn force(dir: &Path, base: Option<&str>, lost: LostChunks) -> Result<Explanation, RecoverError> {
    // A directory that cannot be forced is not even claimed.
    Facts::of(look(dir)?)?.decide(lost)?;
    let state = StateDir::claim(dir)?;
    let facts = Facts::of(look_in(&state)?)?;
    let was = facts.decide(lost)?;
    let params =
        StoreParams { base: base.map(str::to_owned), cache: CacheMode::Buffered, ..StoreParams::default() };
    let store = Store::open_in(state, &params)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let forced = was.map(|was| Forced {
        migration: facts.migration().unwrap_or_default(),
        was,
        before: facts.epoch,
        after: forced_epoch(facts.epoch),
        at: now,
        lost,
        chunks: facts.missing.chunks,
        bytes: facts.missing.bytes,
    });
    store.take_over(&TakeOver {
        runs: &facts.look.runs,
        reverts: facts.look.reverts,
        forced: forced.map(|forced| (facts.volume, forced)),
        lost,
        begins: &begins(&facts, forced.as_ref(), lost, now),
        ends: &format!("{} done\n", utc(now)),
    })?;
    drop(store);
    explain(dir, base, LostChunks::Error)
}

/// What the log says before anything is changed: all of it, for it is the only lasting list of what was lost.
fn begins(facts: &Facts, forced: Option<&Forced>, lost: LostChunks, now: u64) -> String {
    let time = utc(now);
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = match forced {
        Some(forced) => writeln!(
            text,
            "{time} volume {}: made the owner by force; it was {}, epoch {}; it is the owner under epoch {}; migration \
             given up: {}",
            super::report::hex(&facts.volume.0),
            forced.was,
            forced.before.0,
            forced.after.0,
            super::report::hex(&forced.migration.0)
        ),
        None => writeln!(
            text,
            "{time} volume {}: lost chunks are settled; owner under epoch {}",
            super::report::hex(&facts.volume.0),
            facts.epoch.0
        ),
    };
    for loss in words::losses(facts, forced.map(|forced| forced.was), lost) {
        let _ = writeln!(text, "{time} accepted: {loss}");
    }
    for range in &facts.missing.ranges {
        let _ = writeln!(text, "{time} lost: bytes {} to {}", range.start, range.end - 1);
    }
    text
}

#[cfg(test)]
mod tests;
