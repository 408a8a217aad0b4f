// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table alone: against a plain model, under threads, and the traps that it stands for.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;
use crate::volume::waiters::Waker;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const CHUNK: u32 = 64 << 10;
const BLOCK: u32 = 1024;

#[derive(Default)]
struct List {
    notes: Mutex<Vec<Transition>>,
    broken: AtomicBool,
}

impl Notes for List {
    fn note(&self, transitions: &[Transition]) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("broken"));
        }
        self.notes.lock().extend_from_slice(transitions);
        Ok(())
    }
}

struct Bench {
    table: Arc<Table>,
    list: Arc<List>,
    waker: Arc<Waker>,
    next: u64,
}

impl Bench {
    fn new(chunks: u32, based: u32) -> Self {
        let geometry = Geometry::new(u64::from(chunks) * u64::from(CHUNK), CHUNK).unwrap();
        let list = Arc::new(List::default());
        let table = Arc::new(Table::new(geometry, based, Arc::clone(&list) as Arc<dyn Notes>));
        Self { table, list, waker: Arc::new(Waker::new().unwrap()), next: 0 }
    }

    fn begin(&mut self, access: Access, chunk: u32, start: u32, len: u32) -> Begun {
        self.next += 1;
        let seat = Seat { waker: &self.waker, piece: self.next };
        self.table.begin(access, Span { chunk: ChunkId(chunk), start, len }, seat).unwrap()
    }

    fn wakes(&self) -> Vec<Wake> {
        let mut out = Vec::new();
        self.waker.take(&mut out);
        out
    }

    fn set(&self, chunk: u32, state: ChunkState, mask: u64, version: u64) {
        let (chunk, mask, version) = (ChunkId(chunk), BlockMask(mask), Version(version));
        self.table.restore(&Transition { chunk, state, mask, version });
    }

    fn claim(&self, chunk: u32, mask: u64) -> Vec<ChunkId> {
        let claim = Claim { chunk: ChunkId(chunk), blocks: BlockMask(mask) };
        let whole = self.table.publish(&[claim]).unwrap();
        self.table.end_write(ChunkId(chunk));
        whole
    }

    fn now<F: Future>(future: F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::pin!(future).poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }

    fn hold(&self, chunk: u32) -> Exclusive {
        Self::now(self.table.begin_exclusive(ChunkId(chunk))).expect("the chunk is free").unwrap()
    }

    fn look(&self, chunk: u32) -> Look {
        self.table.look(ChunkId(chunk))
    }
}

impl Drop for Bench {
    /// Whatever a test did: the states that were counted are the states that there are.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for state in chunk::ALL_STATES.into_iter().filter(|state| *state != ChunkState::Base) {
            let chunks = self.table.geometry().chunks();
            let found = chunks.filter(|chunk| self.table.look(*chunk).state == state).count();
            assert_eq!(self.table.count(state), found as u64, "{state:?}");
        }
    }
}

fn make_remote(table: &Arc<Table>, run: std::ops::Range<u32>) -> Result<Vec<ChunkId>, TableError> {
    let (state, mask) = (ChunkState::Remote, BlockMask::EMPTY);
    table.change(run, |now| Some(Transition { state, mask, ..now }))
}

#[test]
fn t01_a_read_while_a_fill_holds_the_chunk_waits_and_is_woken() {
    let mut bench = Bench::new(2, 2);
    bench.set(0, ChunkState::Remote, 0, 0);
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: Some(Origin::Source) }));
    // The second one raises no second demand.
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: None }));
    let held = bench.hold(0);
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: None }));
    assert!(matches!(bench.begin(Access::Write, 0, 0, 1024), Begun::Parked { demand: None }));
    // A fill that failed: who needs the content goes on waiting, who waited for the holder looks again.
    drop(held);
    assert_eq!(bench.look(0).state, ChunkState::Remote);
    assert_eq!(bench.wakes().len(), 2);
    bench.hold(0).finish(ChunkState::Modified, BlockMask::EMPTY, Some(Version(9))).unwrap();
    assert_eq!(bench.wakes().len(), 2);
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Layer));
    assert_eq!(bench.look(0).version, Version(9));
}

#[test]
fn t02_the_version_moves_at_both_ends_of_a_write() {
    let mut bench = Bench::new(1, 0);
    bench.set(0, ChunkState::Modified, 0, 4);
    assert!(matches!(bench.begin(Access::Write, 0, 0, 512), Begun::Write { claim: BlockMask::EMPTY }));
    let during = bench.look(0);
    assert_eq!((during.version, during.writers), (Version(5), 1));
    bench.table.end_write(ChunkId(0));
    let after = bench.look(0);
    assert_eq!((after.version, after.writers), (Version(6), 0));
}

#[test]
fn t08_t09_a_claim_keeps_the_rest_remote_and_a_whole_chunk_needs_no_pull() {
    let mut bench = Bench::new(1, 1);
    bench.set(0, ChunkState::Remote, 0, 7);
    assert!(matches!(bench.begin(Access::Write, 0, 0, BLOCK), Begun::Write { claim: BlockMask(1) }));
    // Not valid before it has been written.
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: Some(Origin::Source) }));
    assert!(bench.claim(0, 1).is_empty());
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Layer));
    assert!(matches!(bench.begin(Access::Read, 0, BLOCK, 512), Begun::Parked { demand: None }));
    // Writes to a remote chunk leave the version of the source's copy alone.
    assert_eq!((bench.look(0).state, bench.look(0).version), (ChunkState::Remote, Version(7)));
    assert!(matches!(bench.begin(Access::Write, 0, BLOCK, CHUNK - BLOCK), Begun::Write { .. }));
    assert_eq!(bench.claim(0, !1), [ChunkId(0)]);
    assert_eq!(bench.look(0).state, ChunkState::Modified);
    assert_eq!(bench.wakes().len(), 2);
    let last = bench.list.notes.lock().last().copied().unwrap();
    assert_eq!((last.state, last.mask), (ChunkState::Modified, BlockMask::EMPTY));
}

#[test]
fn a_chunk_written_in_part_has_a_mask_and_no_entry() {
    let mut bench = Bench::new(2, 1);
    let larger = Geometry::new(u64::from(CHUNK) * 4, CHUNK).unwrap();
    bench.table.reserve(&larger);
    bench.table.grow(&larger);
    let rest = |bench: &Bench| {
        assert!(bench.table.shards.iter().all(|shard| shard.lock().is_empty()), "an entry is left");
        (0..4u32).map(|n| bench.table.word(ChunkId(n)).load(SeqCst) & SLOW != 0).collect::<Vec<_>>()
    };
    bench.set(1, ChunkState::Remote, 0b10, 3);
    for chunk in [0, 3] {
        assert!(matches!(bench.begin(Access::Write, chunk, 0, BLOCK), Begun::Write { claim: BlockMask(1) }));
        bench.claim(chunk, 1);
    }
    assert_eq!(rest(&bench), [true, true, false, true]);
    assert_eq!([0, 1, 2, 3].map(|n| bench.look(n).mask.0), [1, 0b10, 0, 1]);
    // Who comes and goes leaves the mask as it was, and finds it.
    let held = bench.hold(3);
    assert_eq!(held.was(), (ChunkState::Base, BlockMask(1), bench.look(3).version));
    assert_eq!(bench.look(3).mask.0, 1);
    drop(held);
    assert_eq!((rest(&bench)[3], bench.look(3).mask.0), (true, 1));
    // A holder may leave another one, and what is whole needs neither mask nor lock.
    bench.hold(0).finish(ChunkState::Base, BlockMask(0b111), None).unwrap();
    assert_eq!(bench.look(0).mask.0, 0b111);
    bench.begin(Access::Write, 3, BLOCK, CHUNK - BLOCK);
    bench.claim(3, !1);
    bench.hold(1).finish(ChunkState::Modified, BlockMask::EMPTY, Some(Version(4))).unwrap();
    assert_eq!(rest(&bench), [true, false, false, false]);
    // A punch drops the mask for readers at once, and for good at its end.
    let Begun::Punch(held) = bench.begin(Access::Zero, 0, 0, CHUNK) else { panic!("it is free") };
    assert_eq!(bench.look(0).mask.0, 0b111, "what a checkpoint must say until then");
    held.finish(ChunkState::Zero, BlockMask::EMPTY, None).unwrap();
    assert_eq!((rest(&bench)[0], bench.look(0).mask.0), (false, 0));
    // A wiped volume has none, grown chunks included.
    bench.set(3, ChunkState::Base, 0b1000, 0);
    bench.table.reset();
    bench.begin(Access::Write, 3, 0, BLOCK);
    bench.claim(3, 1);
    assert_eq!(bench.look(3).mask.0, 1);
}

#[test]
fn a_holder_waits_for_writes_in_flight_and_new_ones_wait_for_it() {
    let mut bench = Bench::new(1, 0);
    bench.set(0, ChunkState::Modified, 0, 0);
    assert!(matches!(bench.begin(Access::Write, 0, 0, 512), Begun::Write { .. }));
    assert!(matches!(bench.begin(Access::Zero, 0, 0, CHUNK), Begun::Parked { demand: None }));
    assert!(matches!(bench.begin(Access::Write, 0, 0, 512), Begun::Parked { demand: None }));
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Layer));
    assert!(bench.wakes().is_empty());
    bench.table.end_write(ChunkId(0));
    let Some(Wake::Granted(2, held)) = bench.wakes().pop() else { panic!("not granted") };
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: None }));
    held.finish(ChunkState::Zero, BlockMask::EMPTY, None).unwrap();
    assert_eq!(bench.wakes().len(), 2);
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Zeros));
}

#[test]
fn a_claimant_that_gives_up_lets_the_others_go_on() {
    let mut bench = Bench::new(1, 0);
    bench.set(0, ChunkState::Modified, 0, 0);
    bench.begin(Access::Write, 0, 0, 512);
    let piece = bench.next + 1;
    bench.begin(Access::Zero, 0, 0, CHUNK);
    bench.begin(Access::Write, 0, 0, 512);
    bench.table.unpark(ChunkId(0), Seat { waker: &bench.waker, piece });
    assert!(matches!(bench.wakes()[..], [Wake::Retry(3)]));
    bench.table.end_write(ChunkId(0));
    assert!(bench.wakes().is_empty());
    // The same for a task: its future is dropped while a write is in flight.
    bench.begin(Access::Write, 0, 0, 512);
    assert!(Bench::now(bench.table.begin_exclusive(ChunkId(0))).is_none());
    bench.begin(Access::Write, 0, 0, 512);
    bench.table.end_write(ChunkId(0));
    assert!(matches!(bench.wakes()[..], [Wake::Retry(5)]));
    assert!(bench.table.shard(ChunkId(0)).is_empty());
    assert_eq!(bench.table.word(ChunkId(0)).load(SeqCst) & SLOW, 0);
}

#[test]
fn a_demand_is_raised_again_after_its_waiters_have_failed() {
    let mut bench = Bench::new(1, 1);
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: Some(Origin::Base) }));
    assert_eq!(bench.table.fail_waiters(ChunkId(0)), 1);
    assert!(matches!(bench.wakes()[..], [Wake::Fail(1)]));
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: Some(Origin::Base) }));
    bench.table.unpark(ChunkId(0), Seat { waker: &bench.waker, piece: 2 });
    assert!(matches!(bench.begin(Access::Read, 0, 0, 512), Begun::Parked { demand: Some(Origin::Base) }));
}

#[test]
fn nothing_changes_when_the_journal_cannot_be_written() {
    let mut bench = Bench::new(2, 2);
    bench.set(0, ChunkState::Local, 0, 0);
    let held = bench.hold(1);
    bench.begin(Access::Write, 1, 0, BLOCK);
    bench.list.broken.store(true, Ordering::SeqCst);
    let seat = Seat { waker: &bench.waker, piece: 99 };
    let span = Span { chunk: ChunkId(0), start: 0, len: 512 };
    assert!(bench.table.begin(Access::Write, span, seat).is_err());
    assert_eq!((bench.look(0).state, bench.look(0).writers), (ChunkState::Local, 0));
    assert!(held.finish(ChunkState::Local, BlockMask::EMPTY, None).is_err());
    assert_eq!(bench.look(1).state, ChunkState::Base);
    assert!(make_remote(&bench.table, 0..2).is_err());
    assert_eq!(bench.look(0).state, ChunkState::Local);
    assert_eq!(bench.table.word(ChunkId(0)).load(SeqCst) & SLOW, 0);
}

#[test]
fn make_remote_leaves_held_chunks_to_their_holder() {
    let mut bench = Bench::new(3, 0);
    bench.set(0, ChunkState::Modified, 0, 3);
    bench.set(1, ChunkState::Base, 6, 2);
    let held = bench.hold(2);
    assert_eq!(make_remote(&bench.table, 0..3).unwrap(), [ChunkId(2)]);
    assert_eq!((bench.look(0).state, bench.look(0).version), (ChunkState::Remote, Version(3)));
    assert_eq!((bench.look(1).state, bench.look(1).mask), (ChunkState::Remote, BlockMask::EMPTY));
    drop(held);
    assert!(matches!(bench.begin(Access::Read, 1, 0, 512), Begun::Parked { demand: Some(Origin::Source) }));
}

/// The model of one chunk: what routing and recovery must see.
#[derive(Debug, Clone, Copy)]
struct Model {
    state: ChunkState,
    mask: u64,
    writers: u32,
}

#[derive(Debug, Clone)]
enum Step {
    /// Write or zero these blocks, and end at once, or leave it in flight.
    Write { chunk: u32, first: u32, blocks: u32, linger: bool },
    /// End all writes in flight.
    EndAll,
    /// Punch.
    Punch { chunk: u32 },
    /// Fill, well or not.
    Fill { chunk: u32, well: bool },
    /// Announced by the source.
    Remote { first: u32, run: u32 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u32..4, 0u32..64, 1u32..64, any::<bool>())
            .prop_map(|(chunk, first, blocks, linger)| Step::Write { chunk, first, blocks, linger }),
        2 => Just(Step::EndAll),
        1 => (0u32..4).prop_map(|chunk| Step::Punch { chunk }),
        2 => (0u32..4, any::<bool>()).prop_map(|(chunk, well)| Step::Fill { chunk, well }),
        1 => (0u32..4, 1u32..4).prop_map(|(first, run)| Step::Remote { first, run: run.min(4 - first) }),
    ]
}

/// The table beside the model.
struct Pair {
    bench: Bench,
    model: Vec<Model>,
    flying: Vec<(u32, u64)>,
}

impl Pair {
    fn end(&mut self, chunk: u32, mask: u64) {
        let claims =
            if mask == 0 { vec![] } else { vec![Claim { chunk: ChunkId(chunk), blocks: BlockMask(mask) }] };
        self.bench.table.publish(&claims).unwrap();
        self.bench.table.end_write(ChunkId(chunk));
        let model = &mut self.model[chunk as usize];
        model.writers -= 1;
        if matches!(model.state, ChunkState::Base | ChunkState::Remote) {
            model.mask |= mask;
            if model.mask == u64::MAX {
                (model.state, model.mask) = (ChunkState::Modified, 0);
            }
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Write { chunk, first, blocks, linger } => {
                let blocks = blocks.min(64 - first);
                let begun = self.bench.begin(Access::Write, chunk, first * BLOCK, blocks * BLOCK);
                let Begun::Write { claim } = begun else { panic!("{begun:?}") };
                let model = &mut self.model[chunk as usize];
                let open = matches!(model.state, ChunkState::Base | ChunkState::Remote);
                assert_eq!(!claim.is_empty(), open);
                if !open {
                    model.state = ChunkState::Modified;
                }
                model.writers += 1;
                if linger {
                    self.flying.push((chunk, claim.0));
                } else {
                    self.end(chunk, claim.0);
                }
            }
            Step::EndAll => {
                for (chunk, mask) in std::mem::take(&mut self.flying) {
                    self.end(chunk, mask);
                }
            }
            Step::Punch { chunk } => self.punch(chunk),
            Step::Fill { chunk, well } => self.fill(chunk, well),
            Step::Remote { first, run } => {
                let busy = make_remote(&self.bench.table, first..first + run).unwrap();
                for chunk in first..first + run {
                    let model = &mut self.model[chunk as usize];
                    assert_eq!(busy.contains(&ChunkId(chunk)), model.writers > 0);
                    if model.writers == 0 {
                        (model.state, model.mask) = (ChunkState::Remote, 0);
                    }
                }
            }
        }
    }

    fn punch(&mut self, chunk: u32) {
        let Model { state, writers, .. } = self.model[chunk as usize];
        match self.bench.begin(Access::Zero, chunk, 0, CHUNK) {
            Begun::Done => assert_eq!(state, ChunkState::Zero),
            Begun::Punch(held) => {
                assert_eq!((held.was().0, writers), (state, 0));
                held.finish(ChunkState::Zero, BlockMask::EMPTY, None).unwrap();
                self.model[chunk as usize] = Model { state: ChunkState::Zero, mask: 0, writers: 0 };
            }
            begun => {
                assert!(matches!(begun, Begun::Parked { demand: None }) && writers > 0, "{begun:?}");
                let piece = self.bench.next;
                self.bench.table.unpark(ChunkId(chunk), Seat { waker: &self.bench.waker, piece });
            }
        }
    }

    fn fill(&mut self, chunk: u32, well: bool) {
        let held = Bench::now(self.bench.table.begin_exclusive(ChunkId(chunk)));
        assert_eq!(held.is_some(), self.model[chunk as usize].writers == 0);
        let Some(held) = held.transpose().unwrap() else {
            // A claimant that has given up is found out when its turn comes; until then new writes wait.
            return self.run(&Step::EndAll);
        };
        let model = &mut self.model[chunk as usize];
        let (was, mask, _) = held.was();
        assert_eq!((was, mask.0), (model.state, model.mask));
        if well && was == ChunkState::Base {
            let state = chunk::after_fetch(mask);
            held.finish(state, BlockMask::EMPTY, None).unwrap();
            (model.state, model.mask) = (state, 0);
        }
    }

    fn check(&self) {
        if self.model.iter().all(|model| model.writers == 0) {
            assert!(self.bench.table.shards.iter().all(|shard| shard.lock().is_empty()), "nobody waits");
        }
        let mut recovered: HashMap<u32, (ChunkState, u64)> = HashMap::new();
        for note in self.bench.list.notes.lock().iter() {
            recovered.insert(note.chunk.0, (note.state, note.mask.0));
        }
        for (chunk, model) in (0u32..).zip(&self.model) {
            let look = self.bench.look(chunk);
            assert_eq!(
                (look.state, look.mask.0, look.writers),
                (model.state, model.mask, u64::from(model.writers))
            );
            let noted = recovered.get(&chunk).copied().unwrap_or((ChunkState::Base, 0));
            assert_eq!(noted, (model.state, model.mask), "what recovery would find of chunk {chunk}");
            let slow = self.bench.table.word(ChunkId(chunk)).load(SeqCst) & SLOW != 0;
            assert!(slow || model.mask == 0);
            assert!(!slow || model.mask != 0 || model.writers > 0);
        }
    }
}

proptest! {
    #[test]
    fn behaves_like_a_plain_model(steps in prop::collection::vec(step(), 1..80)) {
        let model = vec![Model { state: ChunkState::Base, mask: 0, writers: 0 }; 4];
        let mut pair = Pair { bench: Bench::new(4, 4), model, flying: Vec::new() };
        for step in &steps {
            pair.run(step);
            pair.check();
        }
    }
}

/// Four writers, two that punch or fill, on two chunks: nobody is in with a holder, nobody is lost.
#[test]
fn threads_never_meet_a_holder_and_all_get_through() {
    const ROUNDS: u32 = 3000;
    let bench = Bench::new(2, 2);
    let (table, list) = (&bench.table, &bench.list);
    let inside: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];
    let alone: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];
    std::thread::scope(|scope| {
        for n in 0..6u32 {
            let (inside, alone) = (&inside, &alone);
            scope.spawn(move || {
                let waker = Arc::new(Waker::new().unwrap());
                for round in 0..ROUNDS {
                    let chunk = ChunkId((round + n) % 2);
                    let (inside, alone) = (&inside[chunk.index()], &alone[chunk.index()]);
                    let held = |held: Exclusive, state| {
                        assert!(!alone.swap(true, SeqCst));
                        assert_eq!(inside.load(SeqCst), 0);
                        alone.store(false, SeqCst);
                        held.finish(state, BlockMask::EMPTY, None).unwrap();
                    };
                    let start = round % 64 * BLOCK;
                    let (access, start, len) =
                        if n < 4 { (Access::Write, start, BLOCK) } else { (Access::Zero, 0, CHUNK) };
                    loop {
                        let seat = Seat { waker: &waker, piece: u64::from(round) };
                        match table.begin(access, Span { chunk, start, len }, seat).unwrap() {
                            Begun::Write { claim } => {
                                inside.fetch_add(1, SeqCst);
                                assert!(!alone.load(SeqCst));
                                inside.fetch_sub(1, SeqCst);
                                table.publish(&[Claim { chunk, blocks: claim }]).unwrap();
                                table.end_write(chunk);
                                break;
                            }
                            Begun::Punch(exclusive) => break held(exclusive, ChunkState::Zero),
                            Begun::Done => break,
                            Begun::Parked { .. } => {}
                            begun => panic!("{begun:?}"),
                        }
                        match wait(&waker) {
                            Wake::Retry(_) => {}
                            Wake::Granted(_, exclusive) => break held(exclusive, ChunkState::Zero),
                            Wake::Fail(_) => panic!("nobody fails"),
                        }
                    }
                }
            });
        }
    });
    for chunk in [ChunkId(0), ChunkId(1)] {
        let look = table.look(chunk);
        assert_eq!(look.writers, 0);
        let last = list.notes.lock().iter().rfind(|note| note.chunk == chunk).copied().unwrap();
        assert_eq!((last.state, last.mask), (look.state, look.mask), "the journal ends as the table does");
        assert_eq!(table.word(chunk).load(SeqCst) & SLOW != 0, !look.mask.is_empty());
    }
}

fn wait(waker: &Waker) -> Wake {
    loop {
        let mut out = Vec::new();
        waker.take(&mut out);
        if let Some(wake) = out.pop() {
            assert!(out.is_empty(), "one piece waits in one place");
            return wake;
        }
        std::thread::yield_now();
    }
}
