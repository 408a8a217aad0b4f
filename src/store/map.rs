// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The chunk map on disk: journals, checkpoints, and what they mean after a crash.
//!
//! ```text
//!   note ----> journal.g (buffered)            kill -9: checkpoint + all notes
//!   commit --> Commit frame + fdatasync        host crash: checkpoint + notes up to the last Commit,
//!   rotate --> journal.g+1, fuzzy copy,                    Local -> Base, Received -> Modified,
//!              layer sync, checkpoint.g+1, delete g        Zero ranges punched again
//! ```
//!
//! Why `Local` is dropped after a host crash: a guest write turns a `Local` chunk into `Modified`, and that note may
//! be lost while a part of the data reached the disk. A chunk that claims to be the base's but is not would never
//! travel in a migration: the guest would find another content at the destination. `Received` says that another host has
//! the same, and is dropped to `Modified` for the same reason.
//!
//! A new run of the daemon starts a generation of its own, with a fresh checkpoint: boot ids and uncommitted notes of
//! two runs never mix. So sequence numbers only have to grow within a run.
//!
//! Rejected: an embedded database (5 to 12 times slower a commit), and the map in the layer itself (a crash between
//! two sectors would need a journal all the same).

use super::checkpoint;
use super::error::StoreError;
use super::journal::{self, Content, Contents, Frame, Journal, runs_of};
use super::medium::{Folder, Medium, TEMPORARY};
use super::runs::{Run, RunTable, Transition};
use super::{BootId, StoreId};
use crate::core::chunk::ChunkState;
use crate::core::geometry::ChunkId;
use crate::core::message::{Epoch, Version};
use parking_lot::Mutex;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

/// A journal longer than this many bytes asks for a rotation.
pub const ROTATE_AT: u64 = 8 << 20;

/// What a map belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner {
    pub(super) store: StoreId,
    pub(super) boot: BootId,
    /// Number of chunks when the map is made or opened.
    pub(super) chunks: u32,
}

/// The chunk map as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// All chunks, in rising order.
    pub runs: Vec<Run>,
    /// The host went down since the map was last used; what was not committed is gone.
    pub host_crashed: bool,
    /// The newest handoff under which a commit was made, if any was.
    pub committed_handoff: Option<Epoch>,
}

impl Recovered {
    /// Each chunk on its own, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = Transition> + '_ {
        self.runs.iter().flat_map(|run| run.transitions())
    }
}

struct Active {
    journal: Journal,
    /// Journals of this run that no checkpoint covers yet; they must be synced before a commit counts.
    older: Vec<Arc<dyn Medium>>,
    /// Sequence number of the last frame.
    seq: u64,
    /// Sequence number of the last notes.
    noted: u64,
    /// Up to here the last commit went.
    committed: u64,
    committed_handoff: Epoch,
    /// The handoff that commits are made under, and what had been noted when it was set: a commit that does not
    /// reach as far does not cover what came before the handoff, and must not say that it does.
    handoff: Epoch,
    handoff_from: u64,
    /// Up to here the journal is durable.
    synced: u64,
    /// A sync failed: nothing in this generation or before can be made durable any more.
    broken: Option<u64>,
    /// That this journal is due for a rotation has been told.
    told: bool,
}

impl Active {
    fn append(&mut self, content: Content) -> io::Result<u64> {
        let seq = self.seq + 1;
        self.journal.append(&Frame { seq, synced: self.synced, content })?;
        self.seq = seq;
        Ok(seq)
    }

    fn is_due(&self) -> bool {
        self.journal.len() > ROTATE_AT || self.broken.is_some()
    }

    /// Whether a rotation is due, and nobody has been told so.
    fn becomes_due(&mut self) -> bool {
        self.is_due() && !std::mem::replace(&mut self.told, true)
    }
}

/// The durable side of the chunk table. All methods may be called from any thread.
pub struct ChunkMap {
    folder: Arc<dyn Folder>,
    owner: Owner,
    /// Number of chunks now; changes under `rotating`.
    chunks: AtomicU32,
    active: Mutex<Active>,
    /// Held for the time of a commit's sync, so that notes need not wait for it.
    committing: Mutex<()>,
    /// Held for the time of a rotation.
    rotating: Mutex<()>,
    when_due: OnceLock<Box<dyn Fn() + Send + Sync>>,
    keep_versions: AtomicBool,
}

impl std::fmt::Debug for ChunkMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let active = self.active.lock();
        write!(f, "ChunkMap(generation {}, noted {})", active.journal.generation(), active.noted)
    }
}

impl ChunkMap {
    /// Writes the first map of a volume, all chunks in one state.
    pub(super) fn create(
        folder: &Arc<dyn Folder>,
        owner: Owner,
        state: ChunkState,
    ) -> Result<(), StoreError> {
        let header = journal::Header { generation: 1, boot: owner.boot, store: owner.store };
        let io = |name: String| move |error| StoreError::io("write", &folder.path(&name))(error);
        Journal::create(folder.as_ref(), &header).map_err(io(journal::name(1)))?;
        let (store, chunks, handoff) = (owner.store, owner.chunks, Epoch(0));
        let header = checkpoint::Header { generation: 1, store, chunks, handoff, first_seq: 1 };
        let whole = std::iter::once(Ok(Run::whole(owner.chunks, state)));
        checkpoint::write(folder.as_ref(), &header, whole, || Ok(())).map_err(io(checkpoint::name(1)))
    }

    /// Recovers the map by the rules of the module's header. `settle` is told what was found and must make the layer
    /// true to it (punch every `Zero` range after a host crash) and sync it; then a new generation is begun.
    pub(super) fn open(
        folder: &Arc<dyn Folder>,
        owner: Owner,
        settle: impl FnOnce(&Recovered) -> Result<(), StoreError>,
    ) -> Result<(Self, Recovered), StoreError> {
        let files = Generations::find(folder.as_ref())?;
        let (recovered, generation) = files.recover(folder.as_ref(), owner)?;
        settle(&recovered)?;
        let header = journal::Header { generation, boot: owner.boot, store: owner.store };
        let path = folder.path(&journal::name(generation));
        let journal = Journal::create(folder.as_ref(), &header).map_err(StoreError::io("write", &path))?;
        let handoff = recovered.committed_handoff.unwrap_or_default();
        let (store, chunks) = (owner.store, owner.chunks);
        let header = checkpoint::Header { generation, store, chunks, handoff, first_seq: 1 };
        let path = folder.path(&checkpoint::name(generation));
        let runs = recovered.runs.iter().copied().map(Ok);
        checkpoint::write(folder.as_ref(), &header, runs, || Ok(()))
            .map_err(StoreError::io("write", &path))?;
        remove_before(folder.as_ref(), generation);
        let active = Active {
            journal,
            older: Vec::new(),
            seq: 0,
            noted: 0,
            committed: 0,
            committed_handoff: handoff,
            handoff,
            handoff_from: 0,
            synced: 0,
            broken: None,
            told: false,
        };
        let map = Self {
            folder: Arc::clone(folder),
            owner,
            chunks: AtomicU32::new(owner.chunks),
            active: Mutex::new(active),
            committing: Mutex::new(()),
            rotating: Mutex::new(()),
            when_due: OnceLock::new(),
            keep_versions: AtomicBool::new(false),
        };
        Ok((map, recovered))
    }

    /// Notes how chunks stand from now on: it survives a kill of the process, not of the host. Note a transition
    /// before anybody can act on it, and publish it under the same lock (see [`rotate`](Self::rotate)).
    ///
    /// # Errors
    /// The kernel's (no space, for one), or `InvalidInput` for `Installing`: then nothing counts as noted.
    pub fn note(&self, transitions: &[Transition]) -> io::Result<()> {
        if transitions.is_empty() {
            return Ok(());
        }
        let runs = runs_of(transitions)?;
        let due = {
            let mut active = self.active.lock();
            active.noted = active.append(Content::Notes(runs))?;
            active.becomes_due()
        };
        self.tell(due);
        Ok(())
    }

    /// Where the journal is: everything noted up to now is at or before this position. It only grows.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.active.lock().noted
    }

    /// Whether a flush must be followed by a [`commit`](Self::commit): something was noted, or a handoff was set,
    /// since the last one.
    #[must_use]
    pub fn pending(&self) -> bool {
        let active = self.active.lock();
        active.noted > active.committed || active.committed_handoff != active.handoff
    }

    /// Makes everything noted up to `upto` survive a crash of the host. The layer must have been synced after `upto`
    /// was read from [`position`](Self::position). Blocks for an fdatasync of the journal, unless nothing is pending.
    ///
    /// # Errors
    /// The kernel's. A journal whose sync failed once can never be trusted again: commits fail until a rotation has
    /// replaced it.
    pub fn commit(&self, upto: u64) -> io::Result<()> {
        let _one_at_a_time = self.committing.lock();
        let (seq, generation, files, handoff) = {
            let mut active = self.active.lock();
            let covers = upto >= active.handoff_from;
            let handoff = if covers { active.handoff } else { active.committed_handoff };
            if active.committed >= upto && active.committed_handoff == handoff {
                return Ok(());
            }
            if active.broken.is_some() {
                return Err(io::Error::other("an earlier sync of the journal failed"));
            }
            let seq = active.append(Content::Commit { upto, handoff })?;
            let mut files = active.older.clone();
            files.push(Arc::clone(active.journal.file()));
            (seq, active.journal.generation(), files, handoff)
        };
        let synced = files.iter().try_for_each(|file| file.sync());
        let mut active = self.active.lock();
        match &synced {
            Ok(()) => {
                active.synced = active.synced.max(seq);
                active.committed = active.committed.max(upto);
                active.committed_handoff = handoff;
            }
            Err(_) => active.broken = Some(generation),
        }
        let due = active.becomes_due();
        drop(active);
        self.tell(due);
        synced
    }

    /// Sets the handoff (epoch) that commits are made under from now on; the destination sets it when an offer has
    /// been prepared. 0 is none.
    pub fn set_handoff(&self, epoch: Epoch) {
        let mut active = self.active.lock();
        active.handoff = epoch;
        active.handoff_from = active.noted;
    }

    /// The volume has `chunks` chunks from now on, the new ones `Base`. Call it when the superblock says so durably, and
    /// before anything is noted of a new chunk: a rotation that is under way would leave that note out, so it is waited
    /// for. Nothing is written: what a checkpoint does not cover is `Base`.
    pub(super) fn grow(&self, chunks: u32) {
        let _no_rotation = self.rotating.lock();
        self.chunks.fetch_max(chunks, Ordering::SeqCst);
    }

    /// Says whether versions matter (at a destination they are the source's, and are told again after a restart). If
    /// not, checkpoints leave them out, and many more neighbours are alike.
    pub fn keep_versions(&self, keep: bool) {
        self.keep_versions.store(keep, Ordering::SeqCst);
    }

    /// Whether the journal has grown so long (or is broken) that it is time to [`rotate`](Self::rotate).
    #[must_use]
    pub fn wants_rotation(&self) -> bool {
        self.active.lock().is_due()
    }

    /// Calls `tell`, once for each journal, when it becomes time to [`rotate`](Self::rotate), from the thread that noted
    /// or committed: it must not wait. What was due before is not told.
    pub fn when_due(&self, tell: impl Fn() + Send + Sync + 'static) {
        // The volume that the map is for sets it, once.
        drop(self.when_due.set(Box::new(tell)));
    }

    fn tell(&self, due: bool) {
        if due && let Some(tell) = self.when_due.get() {
            tell();
        }
    }

    /// Replaces journal and checkpoint by new ones. `record` tells how a chunk stands *as published*, and must take
    /// the lock under which transitions of that chunk are noted and published: what was noted in the old journal
    /// must be in the copy. `sync_layer` makes the layer durable. Blocks for all of that; notes and commits go on
    /// meanwhile.
    ///
    /// # Errors
    /// The kernel's, or that of a callback. Nothing is lost then: all generations stay until a rotation succeeds.
    pub fn rotate(
        &self,
        record: impl Fn(ChunkId) -> Transition,
        sync_layer: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let keep = self.keep_versions.load(Ordering::SeqCst);
        let run = |n| {
            let mut one = record(ChunkId(n));
            if !keep {
                one.version = Version(0);
            }
            if one.state == ChunkState::Installing || one.chunk.0 != n {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("no lasting record of chunk {n}"),
                ));
            }
            Ok(Run::from(one))
        };
        self.replace(|chunks| (0..chunks).map(run), sync_layer)
    }

    /// Begins anew with all chunks in `Base` and no handoff, durably.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn reset(&self) -> io::Result<()> {
        self.set_handoff(Epoch(0));
        self.replace(|chunks| std::iter::once(Ok(Run::whole(chunks, ChunkState::Base))), || Ok(()))
    }

    fn replace<R: Iterator<Item = io::Result<Run>>>(
        &self,
        runs: impl FnOnce(u32) -> R,
        sync_layer: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let _one_at_a_time = self.rotating.lock();
        let folder = self.folder.as_ref();
        let generation = self.active.lock().journal.generation() + 1;
        let header = journal::Header { generation, boot: self.owner.boot, store: self.owner.store };
        let journal = Journal::create(folder, &header)?;
        let (first_seq, handoff) = {
            let mut active = self.active.lock();
            let old = std::mem::replace(&mut active.journal, journal);
            active.older.push(Arc::clone(old.file()));
            active.told = false;
            // What was noted before this handoff is in the copy.
            (active.seq + 1, active.handoff)
        };
        // Notes go to the new journal now, so the copy has all that the old one has.
        let (store, chunks) = (self.owner.store, self.chunks.load(Ordering::SeqCst));
        let header = checkpoint::Header { generation, store, chunks, handoff, first_seq };
        let mut upto = 0;
        checkpoint::write(folder, &header, runs(chunks), || {
            upto = self.position();
            sync_layer()
        })?;
        {
            let mut active = self.active.lock();
            active.older.clear();
            active.broken = active.broken.filter(|broken| *broken >= generation);
        }
        remove_before(folder, generation);
        // Notes of the new journal that the layer's sync covered: without this commit a host crash would take them
        // back although the checkpoint already has them.
        self.commit(upto)
    }
}

/// The map as [`ChunkMap::open`] would find it; nothing is changed.
pub(super) fn look(folder: &dyn Folder, owner: Owner) -> Result<Recovered, StoreError> {
    Generations::list(folder)?.recover(folder, owner).map(|(recovered, _)| recovered)
}

/// Removes files of generations before `generation`; what cannot be removed now is ignored and removed at a later
/// opening.
fn remove_before(folder: &dyn Folder, generation: u64) {
    let Ok(files) = Generations::find(folder) else { return };
    let old = |list: &[u64]| list.iter().copied().filter(|g| *g < generation).collect::<Vec<_>>();
    // Checkpoints first: a journal without a checkpoint is nothing, a checkpoint without its journal is damage.
    let names = old(&files.checkpoints).into_iter().map(checkpoint::name);
    for name in names.chain(old(&files.journals).into_iter().map(journal::name)) {
        if let Err(error) = folder.remove(&name).and_then(|()| folder.sync_dir()) {
            log::warn!("cannot remove {}: {error}", folder.path(&name).display());
            return;
        }
    }
}

/// The map's files, by generation in rising order.
struct Generations {
    journals: Vec<u64>,
    checkpoints: Vec<u64>,
}

impl Generations {
    /// Lists them, and removes checkpoints that did not come to their end.
    fn find(folder: &dyn Folder) -> Result<Self, StoreError> {
        let names = folder.list().map_err(StoreError::io("list", &folder.path("")))?;
        for name in names.iter().filter(|name| name.starts_with("checkpoint.") && name.ends_with(TEMPORARY)) {
            folder.remove(name).map_err(StoreError::io("remove", &folder.path(name)))?;
        }
        Self::list(folder)
    }

    fn list(folder: &dyn Folder) -> Result<Self, StoreError> {
        let names = folder.list().map_err(StoreError::io("list", &folder.path("")))?;
        let of = |prefix: &str| {
            let numbers = names.iter().filter_map(|name| name.strip_prefix(prefix)?.parse().ok());
            let mut numbers: Vec<u64> = numbers.collect();
            numbers.sort_unstable();
            numbers
        };
        Ok(Self { journals: of("journal."), checkpoints: of("checkpoint.") })
    }

    /// What the files say, and the generation that comes next. That is the number of a journal whose making was cut off, if
    /// there is one, so that it is replaced: left behind, it would be a gap as soon as there is a newer one.
    fn recover(&self, folder: &dyn Folder, owner: Owner) -> Result<(Recovered, u64), StoreError> {
        let missing = |name: &str| StoreError::corrupt(&folder.path(name), "it is missing");
        let base = *self.checkpoints.last().ok_or_else(|| missing("checkpoint"))?;
        let name = checkpoint::name(base);
        let path = folder.path(&name);
        let file =
            folder.open(&name).map_err(StoreError::io("open", &path))?.ok_or_else(|| missing(&name))?;
        let mut runs = Vec::new();
        let header = checkpoint::read(file.as_ref(), &path, owner.chunks, |run| runs.push(run))?;
        if header.store != owner.store || header.generation != base {
            return Err(StoreError::foreign(&path, "belongs to another volume or generation"));
        }
        if header.chunks < owner.chunks {
            // The volume has grown since.
            let (first, count) = (ChunkId(header.chunks), owner.chunks - header.chunks);
            runs.push(Run { first, count, ..Run::whole(count, ChunkState::Base) });
        }
        let journals = self.read_journals(folder, owner, base)?;
        let next = base + journals.len() as u64;
        let host_crashed = journals.iter().any(|(journal, _)| journal.header.boot != owner.boot);
        let frames = sound_frames(&journals, header.first_seq, host_crashed)?;
        let mut commits = frames.iter().filter_map(|frame| match frame.content {
            Content::Commit { upto, handoff } => Some((upto, handoff)),
            Content::Notes(_) => None,
        });
        let committed = commits.clone().map(|(upto, _)| upto).max().unwrap_or(0);
        let handoff = commits.next_back().map_or(header.handoff, |(_, handoff)| handoff);
        let upto = if host_crashed { committed } else { u64::MAX };
        let mut table = RunTable::new(runs.into_iter());
        for frame in frames.iter().filter(|frame| frame.seq <= upto) {
            if let Content::Notes(runs) = &frame.content {
                runs.iter().for_each(|run| table.set(*run));
            }
        }
        let mut runs = table.into_runs();
        if host_crashed {
            runs = drop_copies(runs);
        }
        let committed_handoff = (handoff != Epoch(0)).then_some(handoff);
        Ok((Recovered { runs, host_crashed, committed_handoff }, next))
    }

    /// The journals from generation `base` on, each with its path.
    fn read_journals(
        &self,
        folder: &dyn Folder,
        owner: Owner,
        base: u64,
    ) -> Result<Vec<(Contents, std::path::PathBuf)>, StoreError> {
        let wanted: Vec<u64> =
            self.journals.iter().copied().filter(|generation| *generation >= base).collect();
        let mut journals = Vec::new();
        for (generation, expected) in wanted.iter().copied().zip(base..) {
            let name = journal::name(generation);
            let path = folder.path(&name);
            if generation != expected {
                return Err(StoreError::corrupt(&folder.path(&journal::name(expected)), "it is missing"));
            }
            let Some(file) = folder.open(&name).map_err(StoreError::io("open", &path))? else { continue };
            let contents = match journal::read(file.as_ref(), &path, owner.chunks) {
                // The last journal may have been cut off while it was made, before it had any frame.
                Err(StoreError::Corrupt { .. })
                    if generation > base && wanted.last() == Some(&generation) =>
                {
                    if journal::is_blank(file.as_ref()).map_err(StoreError::io("read", &path))? {
                        continue;
                    }
                    return Err(StoreError::corrupt(&path, "its header is torn or foreign"));
                }
                other => other?,
            };
            if contents.header.store != owner.store || contents.header.generation != generation {
                return Err(StoreError::foreign(&path, "belongs to another volume or generation"));
            }
            journals.push((contents, path));
        }
        if journals.is_empty() {
            return Err(StoreError::corrupt(&folder.path(&journal::name(base)), "it is missing"));
        }
        Ok(journals)
    }
}

/// The frames of all journals up to the first hole, if that hole can be what a crash leaves.
fn sound_frames(
    journals: &[(Contents, std::path::PathBuf)],
    first_seq: u64,
    host_crashed: bool,
) -> Result<Vec<&Frame>, StoreError> {
    let mut sound: Vec<&Frame> = Vec::new();
    let mut whole = true;
    for (contents, path) in journals {
        let next = sound.last().map_or(first_seq, |frame| frame.seq + 1);
        whole &= contents.frames.first().is_none_or(|frame| frame.seq == next);
        if whole {
            sound.extend(&contents.frames);
        }
        let next = sound.last().map_or(first_seq, |frame| frame.seq + 1);
        let behind = if whole { None } else { contents.frames.iter().map(|frame| frame.synced).max() };
        // Frames behind the hole: after a kill there cannot be any; after a host crash they must not say that the
        // missing ones had been durable.
        if let Some(synced) = behind.max(contents.beyond)
            && (!host_crashed || synced >= next)
        {
            return Err(StoreError::corrupt(path, format!("frame {next} is missing or damaged")));
        }
    }
    Ok(sound)
}

/// After a host crash a copy may hold unflushed writes: it is no copy any more.
fn drop_copies(runs: Vec<Run>) -> Vec<Run> {
    let dropped = runs.into_iter().map(|run| match run.state {
        ChunkState::Local => Run { state: ChunkState::Base, ..run },
        ChunkState::Received => Run { state: ChunkState::Modified, ..run },
        ChunkState::Base
        | ChunkState::Zero
        | ChunkState::Modified
        | ChunkState::Remote
        | ChunkState::Installing => run,
    });
    super::runs::merged(dropped).collect()
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
