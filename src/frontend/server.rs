// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vhost-user socket: one front-end at a time, one after another.
//!
//! The process outlives its front-end: a source that has handed over must go on serving pulls, and QEMU reconnects
//! to a daemon that was restarted. So a lost connection is an event, never an end.
//!
//! Each message is looked at before the `vhost` crate reads it. The crate ends the connection on messages that it
//! does not know, and does not answer SET_LOG_FD; those are swallowed here, and answered if the front-end asked for
//! that. SET_BACKEND_REQ_FD is taken here too (`back_channel` says why). After an error the connection goes on unless an answer is owed that cannot be given, for then the
//! front-end, with QEMU's big lock held, would wait for ever: closing is what it can recover from.

use super::back_channel::{self, BackChannel};
use super::handler::{Handler, Parts};
use super::memory::adopt_fd;
use super::ring::{DRAIN_LIMIT, RingHandle, RingOptions};
use super::signal::{Envelope, HoldTimes, Signals};
use super::virtio_blk::Serial;
use crate::config::{Config, FrontendSocket, QueueTuning};
use crate::volume::Volume;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::mpsc::UnboundedSender;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

/// How long a lost front-end's guest memory is kept for its return.
const MEMORY_GRACE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// Pause after a failed accept, so that a lack of descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const HEADER: usize = 12;
const MAX_BODY: u32 = 0x1000;
const FLAG_VERSION: u32 = 1;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;

/// Why the front-end side could not be started.
#[derive(Debug, Error)]
pub enum FrontendError {
    /// The socket.
    #[error("vhost-user socket {0}: {1}")]
    Socket(String, #[source] io::Error),
    /// Another process listens there.
    #[error("vhost-user socket {0}: another process listens there")]
    Busy(String),
    /// The descriptor of `--fd` is no socket.
    #[error("--fd {0}: {1}")]
    Fd(i32, #[source] io::Error),
    /// A queue thread.
    #[error("queue {0}: {1}")]
    Queue(u16, #[source] io::Error),
    /// The front-end thread.
    #[error("front-end thread: {0}")]
    Thread(#[source] io::Error),
}

/// What the front-end side needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// The socket.
    pub socket: FrontendSocket,
    /// Request queues.
    pub queues: u16,
    /// Largest ring size that is expected (QEMU's `queue-size`).
    pub queue_size: u16,
    /// What GET_ID answers; cut at 20 bytes.
    pub serial: String,
    /// A front-end may have been connected to this volume before this process: its starts prove nothing. True
    /// when the daemon went on from a record of a running migration.
    pub reconnect: bool,
    /// Longest time for which a drain waits for requests that need another host; then they fail.
    pub drain_limit: Duration,
    /// How the queue threads run.
    pub tuning: QueueTuning,
}

impl Options {
    /// From the daemon's configuration.
    #[must_use]
    pub fn new(config: &Config, reconnect: bool) -> Self {
        Self {
            socket: config.socket.clone(),
            queues: config.num_queues,
            queue_size: config.queue_size,
            serial: config.serial.clone(),
            reconnect,
            drain_limit: DRAIN_LIMIT,
            tuning: config.queues.clone(),
        }
    }
}

/// Where front-ends come from.
#[derive(Debug)]
enum Source {
    Listener(UnixListener),
    /// One inherited connection; gone after its end.
    Connected(Option<UnixStream>),
}

/// Shared with whoever stops the thread.
#[derive(Debug)]
struct Stop {
    event: OwnedFd,
    /// The connection being served, or that there shall be none any more.
    state: Mutex<StopState>,
}

#[derive(Debug, Default)]
struct StopState {
    stopped: bool,
    connection: Option<UnixStream>,
}

impl Stop {
    fn state(&self) -> MutexGuard<'_, StopState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running front-end side.
#[derive(Debug)]
pub struct Frontend {
    stop: Arc<Stop>,
    signals: Signals,
    holds: Arc<HoldTimes>,
    thread: Option<JoinHandle<()>>,
    path: Option<PathBuf>,
    serial: Serial,
    channel: Arc<BackChannel>,
}

impl Frontend {
    /// Opens the socket and starts the queue threads and the front-end thread. What the messages mean goes to
    /// `signals`; guest I/O goes to `volume`, whose gate decides whether it is served.
    ///
    /// # Errors
    /// A [`FrontendError`] that names the socket or the queue.
    pub fn spawn(
        options: &Options,
        volume: Arc<Volume>,
        signals: UnboundedSender<Envelope>,
    ) -> Result<Self, FrontendError> {
        let source = open(&options.socket)?;
        let signals = Signals::new(signals);
        let holds = Arc::new(HoldTimes::default());
        let serial = Serial::default();
        serial.set(&options.serial);
        let spawn = |index| {
            let ring_options = RingOptions {
                index,
                serial: serial.clone(),
                drain_limit: options.drain_limit,
                tuning: options.tuning.clone(),
            };
            let ring = RingHandle::spawn(ring_options, &volume, &signals);
            ring.map_err(|error| FrontendError::Queue(index, error))
        };
        let rings = (0..options.queues).map(spawn).collect::<Result<Vec<_>, _>>()?;
        let channel = Arc::new(BackChannel::default());
        let handler = Handler::new(Parts {
            volume: Arc::clone(&volume),
            channel: Arc::clone(&channel),
            signals: signals.clone(),
            holds: Arc::clone(&holds),
            rings,
            queue_size: options.queue_size,
            reconnect: options.reconnect,
        });
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = rustix::event::eventfd(0, flags).map_err(|error| FrontendError::Thread(error.into()))?;
        let stop = Arc::new(Stop { event, state: Mutex::default() });
        let mut server = Server { source, stop: Arc::clone(&stop), handler: Arc::new(Mutex::new(handler)) };
        let thread = std::thread::Builder::new()
            .name("front-end".to_owned())
            .spawn(move || server.run())
            .map_err(FrontendError::Thread)?;
        let path = match &options.socket {
            FrontendSocket::Path(path) => Some(path.clone()),
            FrontendSocket::Fd(_) => None,
        };
        Ok(Self { stop, signals, holds, thread: Some(thread), path, serial, channel })
    }

    /// Takes over the serial of a disk that has moved here; GET_ID answers it from now on.
    pub fn set_serial(&self, serial: &str) {
        self.serial.set(serial);
    }

    /// The disk has this capacity in bytes now: the front-end is told, if it can be; it tells the guest.
    pub fn capacity_changed(&self, capacity: u64) {
        self.channel.changed(capacity);
    }

    /// How long the last acknowledgements were held.
    #[must_use]
    pub fn hold_times(&self) -> Arc<HoldTimes> {
        Arc::clone(&self.holds)
    }

    /// Closes the connection, quiesces the rings and ends all threads; also done on drop. Held envelopes are not
    /// waited for. It blocks while local I/O is in flight, and up to the drain limit for requests that wait for
    /// another host if the front-end keeps no in-flight region.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.signals.end();
        {
            let mut state = self.stop.state();
            state.stopped = true;
            if let Some(connection) = state.connection.take()
                && let Err(error) = connection.shutdown(std::net::Shutdown::Both)
            {
                log::debug!("closing the front-end connection: {error}");
            }
        }
        if let Err(error) = rustix::io::write(&self.stop.event, &1u64.to_ne_bytes()) {
            log::warn!("waking the front-end thread: {error}");
        }
        if thread.join().is_err() {
            log::error!("the front-end thread has panicked");
        }
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            log::debug!("{}: {error}", path.display());
        }
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.end();
    }
}

fn open(socket: &FrontendSocket) -> Result<Source, FrontendError> {
    match socket {
        FrontendSocket::Path(path) => listen(path).map(Source::Listener),
        FrontendSocket::Fd(number) => {
            let wrong = |error| FrontendError::Fd(*number, error);
            let fd = adopt_fd(*number).map_err(wrong)?;
            let listening =
                rustix::net::sockopt::socket_acceptconn(&fd).map_err(|error| wrong(error.into()))?;
            if listening {
                Ok(Source::Listener(UnixListener::from(fd)))
            } else {
                Ok(Source::Connected(Some(UnixStream::from(fd))))
            }
        }
    }
}

/// Listens at `path`; a socket file that nobody listens on is replaced.
fn listen(path: &Path) -> Result<UnixListener, FrontendError> {
    let name = || path.display().to_string();
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        result => return result.map_err(|error| FrontendError::Socket(name(), error)),
    }
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    match UnixStream::connect(path) {
        Ok(_) => return Err(FrontendError::Busy(name())),
        Err(error) if is_socket && error.kind() == io::ErrorKind::ConnectionRefused => {
            log::info!("{}: nobody listens on this socket file; it is replaced", path.display());
        }
        Err(error) => return Err(FrontendError::Socket(name(), error)),
    }
    let replaced = std::fs::remove_file(path).and_then(|()| UnixListener::bind(path));
    replaced.map_err(|error| FrontendError::Socket(name(), error))
}

/// The front-end thread.
struct Server {
    source: Source,
    stop: Arc<Stop>,
    handler: Arc<Mutex<Handler>>,
}

impl Server {
    fn run(&mut self) {
        while let Some(stream) = self.next_connection() {
            {
                let mut state = self.stop.state();
                if state.stopped {
                    break;
                }
                state.connection = stream.try_clone().ok();
            }
            self.handler().connected();
            log::info!("a front-end has connected");
            self.serve(stream);
            self.stop.state().connection = None;
            self.handler().disconnected();
        }
    }

    fn handler(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next front-end; `None` when it is time to stop.
    fn next_connection(&mut self) -> Option<UnixStream> {
        loop {
            if let Source::Connected(stream) = &mut self.source
                && let Some(stream) = stream.take()
            {
                return Some(stream);
            }
            let grace = self.handler().holds_stale_memory().then_some(&MEMORY_GRACE);
            let mut fds = vec![PollFd::new(&self.stop.event, PollFlags::IN)];
            if let Source::Listener(listener) = &self.source {
                fds.push(PollFd::new(listener, PollFlags::IN));
            }
            match poll(&mut fds, grace) {
                Ok(0) if self.handler().forget_memory() => {
                    log::debug!("the front-end has not come back; its memory is unmapped");
                    continue;
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("waiting for a front-end: {error}");
                    return None;
                }
            }
            if self.stop.state().stopped {
                return None;
            }
            let came = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            if let (true, Source::Listener(listener)) = (came, &self.source) {
                match listener.accept() {
                    Ok((stream, _)) => return Some(stream),
                    Err(error) => log::warn!("accepting a front-end: {error}"),
                }
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    /// Serves one connection to its end.
    fn serve(&mut self, stream: UnixStream) {
        let mut aside = match stream.try_clone() {
            Ok(aside) => aside,
            Err(error) => return log::error!("front-end connection: {error}"),
        };
        let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&self.handler));
        loop {
            let Some(header) = Header::peek(&aside) else { return log::info!("the front-end has gone") };
            let taken = match FrontendReq::try_from(header.code) {
                Ok(FrontendReq::SET_BACKEND_REQ_FD) => header.take_channel(&mut aside, &mut self.handler()),
                _ if header.is_known() => Ok(false),
                _ => header.swallow(&mut aside, self.handler().acknowledges()).map(|()| true),
            };
            match taken {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => return log::warn!("the front-end connection ends: {error}"),
            }
            log::trace!("message {header:?}");
            self.handler().take_refusal();
            let Err(error) = requests.handle_request() else { continue };
            let refused = self.handler().take_refusal().is_some();
            if !header.survives(&error, refused) {
                return log::warn!("message {}: {error}; the front-end connection ends", header.code);
            }
            if !refused {
                log::warn!("message {}: {error}; ignored", header.code);
            }
        }
    }
}

/// The header of a message that has not been read yet (vhost-user, "Header").
#[derive(Debug, Clone, Copy)]
struct Header {
    code: u32,
    flags: u32,
    size: u32,
}

impl Header {
    /// Waits for the next message; `None` at the end of the connection.
    fn peek(stream: &UnixStream) -> Option<Self> {
        let mut bytes = [0u8; HEADER];
        let len = loop {
            match rustix::net::recv(stream.as_fd(), &mut bytes[..], RecvFlags::PEEK | RecvFlags::WAITALL) {
                Ok((_, len)) => break len,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::warn!("front-end connection: {error}");
                    return None;
                }
            }
        };
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        (len == HEADER).then(|| Self { code: word(0), flags: word(4), size: word(8) })
    }

    /// Whether the crate can handle it, or is to say what is wrong with it.
    fn is_known(self) -> bool {
        use FrontendReq as R;
        let foreign = [
            R::SET_LOG_FD,
            R::SEND_RARP,
            R::NET_SET_MTU,
            R::IOTLB_MSG,
            R::SET_VRING_ENDIAN,
            R::CREATE_CRYPTO_SESSION,
            R::CLOSE_CRYPTO_SESSION,
            R::POSTCOPY_ADVISE,
            R::POSTCOPY_LISTEN,
            R::POSTCOPY_END,
            R::VRING_KICK,
            R::SET_STATUS,
            R::GET_STATUS,
        ];
        match FrontendReq::try_from(self.code) {
            Ok(code) => !foreign.contains(&code),
            Err(_) => false,
        }
    }

    /// Reads a message that is not for us, and answers if the front-end wants that: SET_LOG_FD is fine (there is
    /// nobody to be told), the rest is refused.
    fn swallow(self, stream: &mut UnixStream, acknowledges: bool) -> io::Result<()> {
        let mut rest = vec![0u8; self.whole()?];
        stream.read_exact(&mut rest)?;
        let fine = FrontendReq::try_from(self.code).is_ok_and(|code| code == FrontendReq::SET_LOG_FD);
        log::debug!(
            "message {} is not for a block device; {}",
            self.code,
            if fine { "ignored" } else { "refused" }
        );
        self.acknowledge(stream, acknowledges, fine)
    }

    /// Takes the back-end channel that the front-end offers.
    fn take_channel(self, stream: &mut UnixStream, handler: &mut Handler) -> io::Result<bool> {
        let socket = back_channel::receive(stream, self.whole()?)?;
        let taken = handler.take_channel(socket);
        self.acknowledge(stream, handler.acknowledges(), taken).map(|()| true)
    }

    /// Bytes of the message with its header.
    fn whole(self) -> io::Result<usize> {
        if self.size > MAX_BODY || self.flags & 3 != FLAG_VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a vhost-user message"));
        }
        Ok(HEADER + self.size as usize)
    }

    /// Answers if the front-end wants that.
    fn acknowledge(self, stream: &mut UnixStream, acknowledges: bool, fine: bool) -> io::Result<()> {
        if !acknowledges || self.flags & FLAG_NEED_REPLY == 0 {
            return Ok(());
        }
        let mut reply = Vec::with_capacity(HEADER + 8);
        for word in [self.code, FLAG_VERSION | FLAG_REPLY, 8, u32::from(!fine), 0] {
            reply.extend_from_slice(&word.to_ne_bytes());
        }
        stream.write_all(&reply)
    }

    /// Whether the connection can go on after this error: the message has been read whole, and no answer is owed
    /// that was not given. The crate acknowledges what the handler refuses, and every SET_MEM_TABLE.
    fn survives(self, error: &VhostError, refused: bool) -> bool {
        use FrontendReq as R;
        let broken = matches!(
            error,
            VhostError::Disconnected
                | VhostError::PartialMessage
                | VhostError::SocketBroken(_)
                | VhostError::SocketError(_)
                | VhostError::SocketRetry(_)
        );
        let Ok(code) = FrontendReq::try_from(self.code) else { return false };
        let whole = !broken && self.size <= MAX_BODY && self.flags & 3 == FLAG_VERSION;
        let answers = [
            R::GET_FEATURES,
            R::GET_PROTOCOL_FEATURES,
            R::GET_QUEUE_NUM,
            R::GET_VRING_BASE,
            R::GET_CONFIG,
            R::GET_INFLIGHT_FD,
            R::GET_MAX_MEM_SLOTS,
            R::GET_SHARED_OBJECT,
            R::GET_SHMEM_CONFIG,
            R::SET_LOG_BASE,
            R::SET_DEVICE_STATE_FD,
            R::CHECK_DEVICE_STATE,
        ];
        let acknowledged = refused || code == R::SET_MEM_TABLE || self.flags & FLAG_NEED_REPLY == 0;
        whole && acknowledged && !answers.contains(&code)
    }
}
