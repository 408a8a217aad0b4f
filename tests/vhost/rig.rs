// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The back-end under test, and a stand-in for the node that answers its signals.

use blkferry::config::{FrontendSocket, QueueTuning};
use blkferry::frontend::server::{Frontend, Options};
use blkferry::frontend::signal::{Envelope, HypervisorSignal, Verdict};
use blkferry::store::{Store, StoreParams};
use blkferry::volume::{Closed, Volume, VolumeEvents, VolumeOptions};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// How the stand-in answers; returns `None` for the usual answer.
pub type Policy = Box<dyn FnMut(&HypervisorSignal) -> Option<Verdict> + Send>;

/// A daemon without a node: volume, front-end side, and a thread that answers signals.
pub struct Rig {
    pub dir: TempDir,
    pub volume: Arc<Volume>,
    pub frontend: Option<Frontend>,
    pub signals: Arc<Mutex<Vec<HypervisorSignal>>>,
    pub tuning: QueueTuning,
    pub drain_limit: Duration,
    _events: VolumeEvents,
}

/// What a rig is made with.
pub struct Setup {
    pub size: u64,
    pub queues: u16,
    pub read_only: bool,
    pub policy: Policy,
    pub drain_limit: Duration,
    pub tuning: QueueTuning,
    pub base: Option<PathBuf>,
    pub chunk_size: Option<u32>,
    /// Where the state directory is, if not beside the socket.
    pub state: Option<PathBuf>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            size: 16 << 20,
            queues: 1,
            read_only: false,
            policy: Box::new(|_| None),
            drain_limit: Duration::from_secs(20),
            tuning: QueueTuning::default(),
            base: None,
            chunk_size: None,
            state: None,
        }
    }
}

/// Opens the gate when rings start, closes it when they stop, agrees to everything.
fn node(
    mut signals: UnboundedReceiver<Envelope>,
    volume: &Volume,
    seen: &Mutex<Vec<HypervisorSignal>>,
    mut policy: Policy,
) {
    while let Some(Envelope { signal, reply }) = signals.blocking_recv() {
        let verdict = policy(&signal).unwrap_or_else(|| {
            match signal {
                HypervisorSignal::RingsStarting { .. } => volume.gate().open(),
                HypervisorSignal::RingsStopped => volume.gate().close(Closed::Offered),
                _ => {}
            }
            Verdict::Proceed
        });
        seen.lock().unwrap().push(signal);
        if let Some(reply) = reply {
            reply.send(verdict).unwrap();
        }
    }
}

impl Rig {
    pub fn new(setup: Setup) -> Self {
        let _ = env_logger::builder().is_test(true).try_init();
        let dir = tempfile::tempdir().unwrap();
        let (volume, events) = open_volume(&dir, &setup);
        let (drain_limit, tuning) = (setup.drain_limit, setup.tuning.clone());
        let signals = Arc::default();
        let mut rig = Self { dir, volume, frontend: None, signals, drain_limit, tuning, _events: events };
        rig.spawn(setup.queues, false, setup.policy);
        rig
    }

    /// Starts the front-end side (again), as a restarted daemon would on the same volume.
    pub fn spawn(&mut self, queues: u16, reconnect: bool, policy: Policy) {
        let (sender, receiver) = unbounded_channel();
        let options = Options {
            socket: FrontendSocket::Path(self.socket()),
            queues,
            queue_size: 128,
            serial: "test-serial".to_owned(),
            reconnect,
            drain_limit: self.drain_limit,
            tuning: self.tuning.clone(),
        };
        let (volume, seen) = (Arc::clone(&self.volume), Arc::clone(&self.signals));
        self.frontend = Some(Frontend::spawn(&options, Arc::clone(&self.volume), sender).unwrap());
        std::thread::spawn(move || node(receiver, &volume, &seen, policy));
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost.sock")
    }

    pub fn seen(&self) -> Vec<HypervisorSignal> {
        self.signals.lock().unwrap().clone()
    }

    pub fn count(&self, signal: &HypervisorSignal) -> usize {
        self.seen().iter().filter(|seen| *seen == signal).count()
    }

    /// Waits until the signal has been seen that often.
    pub fn wait_for(&self, signal: &HypervisorSignal, times: usize) {
        wait_until(&format!("{signal:?}"), || self.count(signal) >= times);
    }

    /// Ends it and waits until its state directory may be opened again.
    pub fn close(mut self) {
        drop(self.frontend.take());
        let volume = Arc::clone(&self.volume);
        drop(self);
        wait_until("the end of the volume", || Arc::strong_count(&volume) == 1);
    }

    /// Bytes of the disk, as the layer file has them.
    pub fn layer(&self, offset: u64, len: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        std::fs::File::open(self.dir.path().join("state/layer"))
            .unwrap()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        bytes
    }
}

/// Waits for something that must come; fails the test when it does not.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(20), "{what} does not come");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn open_volume(dir: &TempDir, setup: &Setup) -> (Arc<Volume>, VolumeEvents) {
    let base = setup.base.as_ref().map(|path| path.display().to_string());
    let (size, chunk_size) = (Some(setup.size), setup.chunk_size);
    let params = StoreParams { base, size, chunk_size, ..StoreParams::default() };
    let state = setup.state.clone().unwrap_or_else(|| dir.path().join("state"));
    let store = Store::open(&state, &params).unwrap();
    let options = VolumeOptions { read_only: setup.read_only, write_cache: true };
    Volume::open(store, options, Box::new(|| {})).unwrap()
}
