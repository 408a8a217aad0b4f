// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Start and end of a daemon: opens what it serves, starts its threads, runs the node.
//!
//! Order matters. The state directory is locked and opened first: a second daemon, a foreign directory or a torn file
//! must be refused before anything listens. The front-end's socket comes before the record is acted on, since a
//! destination's hypervisor blocks until it is connected. The gate is closed until the role is known.

use super::NodeError;
use super::holds::Holds;
use super::input::Input;
use super::jobs::Jobs;
use super::node::{Node, RoleDriver};
use super::report::Report;
use super::status::{Command, NodeHandle, Snapshot};
use crate::config::Config;
use crate::core::geometry::{ChunkId, Geometry};
use crate::core::message::{Epoch, Hello, Message, Refusal};
use crate::core::record::{DestinationRecord, DestinationStage, MigrationRecord, Role, SourceStage};
use crate::core::set::ChunkSet;
use crate::frontend::features;
use crate::frontend::server::{Frontend, Options};
use crate::peer::{LinkEvent, LinkOptions, ListenParams, Listener, PeerLink, Throttle, TlsClient, TlsServer};
use crate::store::{StateDir, Store, StoreError, StoreParams};
use crate::volume::{Closed, Transfer, Volume, VolumeOptions};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_local;

/// How long a peer may take to greet a daemon that has no volume yet.
const GREETING: Duration = Duration::from_secs(5);
/// Room for commands that wait their turn.
const COMMANDS: usize = 16;

/// What the surface above starts when the node can be asked: it gets the handle and runs beside the node.
pub type Surface = Box<dyn FnOnce(NodeHandle) -> Result<(), NodeError>>;

/// Serves one volume until SIGTERM or SIGINT.
///
/// `surface` is called once, inside the runtime, to start the API.
///
/// # Errors
/// A [`NodeError`] that names what cannot be opened or started and what to do.
pub fn run(config: Config, surface: Surface) -> Result<(), NodeError> {
    config.validate()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(NodeError::Runtime)?;
    let local = tokio::task::LocalSet::new();
    let result = local.block_on(&runtime, serve(config, surface));
    // Blocking jobs are record writes: they end by themselves.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    result
}

async fn serve(config: Config, surface: Surface) -> Result<(), NodeError> {
    let (inputs, mut queue) = mpsc::unbounded_channel();
    let (snapshots, snapshot_view) = watch::channel(Snapshot::default());
    let (commands, mut command_queue) = mpsc::channel::<Command>(COMMANDS);
    watch_for_signals(&inputs)?;
    // A second daemon, or a foreign directory, is refused before anything listens.
    let state = StateDir::claim(&config.state_dir)?;
    let throttle = Throttle::new(config.bandwidth);
    let client = config.tls_dir.as_deref().map(TlsClient::from_dir).transpose()?;
    let mut listener = listen(&config, &throttle).await?;
    surface(NodeHandle { commands, snapshots: snapshot_view })?;
    let forward = inputs.clone();
    spawn_local(async move {
        while let Some(command) = command_queue.recv().await {
            if forward.send(Input::Command(command)).is_err() {
                break;
            }
        }
    });
    let mut first = None;
    let known = config.size.is_some() || config.base.is_some() || config.blk_file.is_some();
    let store = match known || state.superblock()?.is_some() {
        true => Store::open_in(state, &StoreParams::from(&config))?,
        false => {
            let Some(listener) = &mut listener else { return Err(NodeError::NoSize) };
            log::info!("no size is known yet: waiting for a migration source to name it");
            let Some((link, hello)) = await_source(listener, &mut queue, &config).await else {
                return Ok(());
            };
            let params = StoreParams {
                size: Some(hello.size),
                chunk_size: Some(hello.chunk_size),
                ..StoreParams::from(&config)
            };
            first = Some((link, hello));
            Store::open_in(state, &params)?
        }
    };
    let plumbing = Plumbing { inputs: inputs.clone(), snapshots, throttle, tls: client };
    let node = build(config, store, plumbing).await?;
    if let Some((link, hello)) = first {
        let _ = inputs.send(Input::Greeted(link, Box::new(hello)));
    }
    if let Some(listener) = listener {
        accept_sources(listener, inputs);
    }
    node.run(queue).await;
    Ok(())
}

fn watch_for_signals(inputs: &mpsc::UnboundedSender<Input>) -> Result<(), NodeError> {
    use tokio::signal::unix::{SignalKind, signal};
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut stream = signal(kind).map_err(NodeError::Runtime)?;
        let inputs = inputs.clone();
        spawn_local(async move {
            if stream.recv().await.is_some() {
                log::info!("asked to stop");
                let _ = inputs.send(Input::Shutdown);
            }
        });
    }
    Ok(())
}

fn accept_sources(mut listener: Listener, inputs: mpsc::UnboundedSender<Input>) {
    spawn_local(async move {
        while let Some(link) = listener.accept().await {
            if inputs.send(Input::Accepted(link)).is_err() {
                break;
            }
        }
    });
}

/// Listens for migration sources, if that was asked for.
async fn listen(config: &Config, throttle: &Throttle) -> Result<Option<Listener>, NodeError> {
    let Some(address) = config.listen else { return Ok(None) };
    let link = LinkOptions { throttle: throttle.clone(), ..LinkOptions::default() };
    let tls = config.tls_dir.as_deref().map(TlsServer::from_dir).transpose()?;
    let params = ListenParams { tls, link, ..ListenParams::default() };
    let listener =
        Listener::bind(address, params).await.map_err(|error| NodeError::Listen { address, error })?;
    log::info!("listening for migration sources on {}", listener.local_addr());
    Ok(Some(listener))
}

/// Waits for the first source, answering commands meanwhile; `None` when it is time to stop.
async fn await_source(
    listener: &mut Listener,
    queue: &mut mpsc::UnboundedReceiver<Input>,
    config: &Config,
) -> Option<(PeerLink, Hello)> {
    loop {
        let mut link = tokio::select! {
            link = listener.accept() => link?,
            input = queue.recv() => match input {
                Some(Input::Command(command)) => {
                    command.deny("not-owner", "this daemon waits for a migration source to name its size");
                    continue;
                }
                Some(Input::Shutdown) | None => return None,
                Some(_) => continue,
            },
        };
        let greeting = tokio::select! {
            event = link.rx.recv() => event,
            () = tokio::time::sleep(GREETING) => None,
        };
        match greeting {
            Some(LinkEvent::Message(Message::Hello(hello))) => match acceptable(config, &hello) {
                Ok(()) => return Some((link, hello)),
                Err((reason, text)) => {
                    log::warn!("a migration source at {} was turned away: {text}", link.peer);
                    // The peer may be gone already.
                    let _ = link.tx.send(Message::Refuse { reason, text });
                }
            },
            Some(LinkEvent::Message(_) | LinkEvent::Closed(_)) | None => {
                log::warn!("a peer at {} did not greet", link.peer);
            }
        }
        link.tx.close();
    }
}

/// What must hold before a source's size is taken over for good.
fn acceptable(config: &Config, hello: &Hello) -> Result<(), (Refusal, String)> {
    Geometry::new(hello.size, hello.chunk_size).map_err(|error| (Refusal::Geometry, error.to_string()))?;
    if hello.base.length != 0 {
        let text = "the source's volume has a base image: start this daemon with --base".to_owned();
        return Err((Refusal::BaseIdentity, text));
    }
    let missing = hello.virtio_features & !features::virtio_features(config.read_only);
    if missing != 0 || hello.read_only != config.read_only || hello.queues > config.num_queues {
        let text = "the source's device has other features or more queues than this one".to_owned();
        return Err((Refusal::Features, text));
    }
    Ok(())
}

/// What a node is plugged into.
struct Plumbing {
    inputs: mpsc::UnboundedSender<Input>,
    snapshots: watch::Sender<Snapshot>,
    throttle: Throttle,
    tls: Option<TlsClient>,
}

/// Moves values of one channel into the node's queue.
fn forward<T: 'static>(
    mut from: mpsc::UnboundedReceiver<T>,
    inputs: mpsc::UnboundedSender<Input>,
    wrap: fn(T) -> Input,
) {
    spawn_local(async move {
        while let Some(value) = from.recv().await {
            if inputs.send(wrap(value)).is_err() {
                break;
            }
        }
    });
}

async fn build(config: Config, store: Store, plumbing: Plumbing) -> Result<Node, NodeError> {
    let Plumbing { inputs, snapshots, throttle, tls } = plumbing;
    let superblock = store.superblock();
    let recorded = store.record.load();
    let forced = store.forced()?;
    // An adopted image is a disk already.
    let fresh = superblock.layer_path.is_none();
    let options = VolumeOptions { read_only: config.read_only, write_cache: !superblock.write_through };
    let waker = inputs.clone();
    let dirty = Box::new(move || drop(waker.send(Input::Wrote)));
    let (volume, events) = Volume::open(store, options, dirty).map_err(NodeError::Volume)?;
    let store = Arc::clone(volume.store());
    let transfer = Rc::new(Transfer::open(&volume).map_err(NodeError::Volume)?);
    forward(events, inputs.clone(), Input::Volume);
    let (signals, signal_queue) = mpsc::unbounded_channel();
    forward(signal_queue, inputs.clone(), Input::Signal);
    let migrating = matches!(
        recorded,
        Some((MigrationRecord::V1 { role: Role::Source(_) | Role::Destination(_), .. }, _))
    );
    let mut options = Options::new(&config, migrating);
    options.serial.clone_from(&superblock.serial);
    let frontend = Frontend::spawn(&options, Arc::clone(&volume), signals)?;
    let jobs = Jobs::new(inputs.clone(), Rc::clone(&transfer), Arc::clone(&store));
    let mut node = Node {
        device_features: features::virtio_features(config.read_only),
        guest_features: None,
        volume,
        volume_id: superblock.volume,
        base: superblock.base,
        epoch: Epoch(1),
        virgin: recorded.is_none() && fresh,
        unwiped: false,
        incarnation: uuid::Uuid::new_v4().as_u64_pair().0,
        transfer,
        store,
        jobs,
        holds: Holds::default(),
        report: Report::default(),
        throttle,
        tls,
        role: RoleDriver::Idle,
        frontend,
        frontend_connected: false,
        rings_running: false,
        resizing: None,
        drain: super::drain::DrainPace::default(),
        wire_before: 0,
        link_number: 0,
        inputs,
        snapshots,
        started: Instant::now(),
        fault: String::new(),
        source_watch: super::away::SourceWatch::default(),
        forced: super::forced::ForcedOwner::new(forced),
        shown: None,
        config,
    };
    node.take_up(recorded, fresh).await?;
    Ok(node)
}

impl Node {
    /// Takes up the role that the record tells of.
    async fn take_up(
        &mut self,
        recorded: Option<(MigrationRecord, bool)>,
        fresh: bool,
    ) -> Result<(), NodeError> {
        let Some((MigrationRecord::V1 { volume, epoch, role }, same_boot)) = recorded else {
            // A new, empty volume that listens may become a destination: it owns nothing until a guest starts
            // afresh here or a migration arrives.
            if self.config.listen.is_none() || !fresh {
                self.claim().map_err(NodeError::Claim)?;
            } else {
                self.close_gate(Closed::Idle);
            }
            return Ok(());
        };
        self.epoch = epoch;
        self.volume_id = volume;
        match role {
            Role::Serving => {
                self.role = RoleDriver::Serving;
                self.open_gate();
            }
            Role::Idle => {
                self.close_gate(Closed::Idle);
                // The daemon may have ended before all that had come was dropped.
                self.transfer.wipe().await.map_err(NodeError::Transfer)?;
            }
            Role::Source(record) => {
                let serves = record.stage == SourceStage::Pushing;
                self.resume_source(&record, same_boot);
                if serves {
                    self.open_gate();
                } else {
                    self.close_gate(Closed::Offered);
                }
            }
            Role::Destination(record) => self.take_up_destination(&record, same_boot).await?,
        }
        Ok(())
    }

    /// The source's modified set as it was at the offer, with its write counts.
    fn modified_at_source(&self) -> Result<Vec<(ChunkId, u8)>, NodeError> {
        let stored = self.store.load_remaining()?.filter(|(epoch, _)| *epoch == self.epoch);
        // It was durable before the record that needs it: to take none for an empty one would be to invent a disk.
        let Some((_, runs)) = stored else {
            let path = self.store.dir().join("remaining");
            let detail = "it is missing, or of another epoch".to_owned();
            return Err(StoreError::Corrupt { path, detail }.into());
        };
        let chunks = runs.into_iter().flat_map(|run| {
            (run.first.0..run.first.0.saturating_add(run.run)).map(move |chunk| (ChunkId(chunk), run.count))
        });
        Ok(chunks.collect())
    }

    /// After a crash of the host, what had come and was not committed since the handoff counts as not come.
    async fn take_up_destination(
        &mut self,
        record: &DestinationRecord,
        same_boot: bool,
    ) -> Result<(), NodeError> {
        let entries = match record.stage {
            DestinationStage::Prepared | DestinationStage::Active { .. } => self.modified_at_source()?,
            DestinationStage::Receiving | DestinationStage::Complete => Vec::new(),
        };
        self.store.map.keep_versions(true);
        // Before the revert: its commit is then one under this handoff, and is not taken back by a second restart.
        if matches!(record.stage, DestinationStage::Prepared | DestinationStage::Active { .. }) {
            self.store.map.set_handoff(self.epoch);
        }
        if !same_boot && record.stage != DestinationStage::Complete {
            let committed = self.store.recovered.committed_handoff.is_some_and(|epoch| epoch >= self.epoch);
            if !committed {
                log::warn!("the host went down before what had come was committed: it is fetched again");
                let modified: ChunkSet = entries.iter().map(|entry| entry.0).collect();
                self.transfer.revert_to_remote(&modified).await.map_err(NodeError::Transfer)?;
            }
        }
        let counts: HashMap<_, _> = entries.into_iter().collect();
        let remote = self.transfer.remote_chunks();
        let remaining =
            remote.iter().map(|chunk| (chunk, counts.get(&chunk).copied().unwrap_or(0))).collect();
        self.resume_destination(record, remaining);
        Ok(())
    }
}
