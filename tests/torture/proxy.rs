// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What stands between the peers: it reads every frame with the product's own codec and passes it on, until a message
//! comes that a trap waits for. It also is the bad network: slow, silent, torn, or with flipped bits.

use blkferry::core::message::{Message, Purpose};
use blkferry::wire::codec;
use blkferry::wire::frame::{HEADER_LEN, Header, PREAMBLE_LEN, Preamble};
use socket2::SockRef;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often a pump that waits looks up.
const LOOK: Duration = Duration::from_millis(5);
/// Time for the receiver to act on a message before the blow falls that comes after it.
const AFTER_MS: u64 = 4;

/// A message of the protocol that a fault waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Point {
    Hello,
    Welcome,
    Announce,
    Push,
    Ack,
    Offer,
    Prepared,
    Activate,
    Granted,
    Synced,
    Pull,
    Pulled,
    Complete,
    Released,
    Reclaimed,
    Cancel,
    Cancelled,
    Replica,
    Keep,
    Have,
}

impl Point {
    pub fn is(self, message: &Message) -> bool {
        match (self, message) {
            (Self::Hello, Message::Hello(_))
            | (Self::Welcome, Message::Welcome(_))
            | (Self::Announce, Message::Announce { .. })
            | (Self::Ack, Message::Ack { .. })
            | (Self::Offer, Message::Offer(_))
            | (Self::Prepared, Message::Prepared { .. })
            | (Self::Activate, Message::Activate { .. })
            | (Self::Granted, Message::Granted { .. })
            | (Self::Synced, Message::Synced { .. })
            | (Self::Pull, Message::Pull { .. })
            | (Self::Complete, Message::Complete { .. })
            | (Self::Released, Message::Released { .. })
            | (Self::Reclaimed, Message::Reclaimed { .. })
            | (Self::Cancel, Message::Cancel)
            | (Self::Cancelled, Message::Cancelled)
            | (Self::Replica, Message::Replica { .. })
            | (Self::Keep, Message::Keep { .. })
            | (Self::Have, Message::Have { .. }) => true,
            (Self::Push, Message::Chunk(chunk)) => chunk.purpose == Purpose::Push,
            (Self::Pulled, Message::Chunk(chunk)) => chunk.purpose != Purpose::Push,
            _ => false,
        }
    }
}

/// When the blow falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Moment {
    /// Before the message is passed on; it is lost with its connection.
    Lost,
    /// Before the message is passed on; it still arrives.
    Before,
    /// A little after it was passed on.
    After,
}

/// What befalls the frame that was waited for, beside the blow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    None,
    /// One bit of it flips; the number says which.
    Flip(u64),
}

/// Waits for a message.
pub struct Trap {
    pub point: Point,
    /// Messages of this kind that pass first.
    pub skip: u64,
    pub moment: Moment,
    pub harm: Harm,
    /// The blow.
    pub strike: Box<dyn FnOnce() + Send>,
}

/// What all threads of a proxy share.
#[derive(Default)]
struct State {
    trap: Mutex<Option<Trap>>,
    /// Nothing is passed on, and nobody is told.
    silent: AtomicBool,
    /// Goes up when all connections are to be torn.
    cuts: AtomicU64,
    /// Bytes a second in each direction of each stream; 0 is no limit.
    speed: AtomicU64,
    ended: AtomicBool,
    /// Bytes that were no frames of the protocol.
    bad: Mutex<Vec<String>>,
}

/// The way from a source to a destination.
pub struct Proxy {
    state: Arc<State>,
    pub address: String,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a port of its own at `host` for whoever wants to speak to `target`.
    pub fn new(host: &str, target: &str) -> Self {
        let listener = TcpListener::bind((host, 0)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let target: SocketAddr = target.parse().unwrap();
        listener.set_nonblocking(true).unwrap();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let acceptor = std::thread::spawn(move || accept(&shared, &listener, target));
        Self { state, address, acceptor: Some(acceptor) }
    }

    pub fn set(&self, trap: Trap) {
        *self.state.trap.lock().unwrap() = Some(trap);
    }

    /// A handle for blows that change the network.
    pub fn network(&self) -> Network {
        Network(Arc::clone(&self.state))
    }

    /// What passed that was no message, if anything.
    pub fn bad(&self) -> Vec<String> {
        self.state.bad.lock().unwrap().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Release);
        self.acceptor.take().unwrap().join().ok();
    }
}

/// The network between the peers.
#[derive(Clone)]
pub struct Network(Arc<State>);

impl Network {
    /// Tears all connections: both ends get a reset.
    pub fn cut(&self) {
        self.0.cuts.fetch_add(1, Ordering::AcqRel);
    }

    /// Stops to pass anything on, and goes on with what was held after this time.
    pub fn be_silent(&self, time: Duration) {
        self.0.silent.store(true, Ordering::Release);
        let state = Arc::clone(&self.0);
        std::thread::spawn(move || {
            std::thread::sleep(time);
            state.silent.store(false, Ordering::Release);
        });
    }

    pub fn speed(&self, bytes: u64) {
        self.0.speed.store(bytes, Ordering::Release);
    }
}

fn accept(state: &Arc<State>, listener: &TcpListener, target: SocketAddr) {
    let mut pumps = Vec::new();
    while !state.ended.load(Ordering::Acquire) {
        if state.silent.load(Ordering::Acquire) {
            std::thread::sleep(LOOK);
            continue;
        }
        match listener.accept() {
            Ok((near, _)) => {
                let Ok(far) = TcpStream::connect(target) else { continue };
                let ends = Arc::new([near, far]);
                for end in ends.iter() {
                    end.set_nonblocking(false).unwrap();
                    end.set_nodelay(true).unwrap();
                    end.set_read_timeout(Some(LOOK)).unwrap();
                    end.set_write_timeout(Some(LOOK)).unwrap();
                }
                let cuts = state.cuts.load(Ordering::Acquire);
                let torn = Arc::new(AtomicBool::new(false));
                for from in [0, 1] {
                    let (state, ends, torn) = (Arc::clone(state), Arc::clone(&ends), Arc::clone(&torn));
                    let mut pump = Pump { state, ends, from, cuts, torn };
                    pumps.push(std::thread::spawn(move || pump.run()));
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1))
            }
            Err(error) => panic!("proxy: {error}"),
        }
        pumps.retain(|pump| !pump.is_finished());
    }
    for pump in pumps {
        pump.join().ok();
    }
}

/// Why a pump ends.
enum End {
    /// The sender has said all; the receiver hears of it.
    Closed,
    /// The connection goes, with a reset.
    Torn,
}

/// One direction of one stream.
struct Pump {
    state: Arc<State>,
    ends: Arc<[TcpStream; 2]>,
    from: usize,
    cuts: u64,
    torn: Arc<AtomicBool>,
}

impl Pump {
    fn run(&mut self) {
        let mut bytes = Vec::new();
        let end = self.pass_all(&mut bytes);
        match end {
            End::Closed => {
                self.ends[1 - self.from].shutdown(std::net::Shutdown::Write).ok();
            }
            End::Torn => {
                self.torn.store(true, Ordering::Release);
                for end in self.ends.iter() {
                    SockRef::from(end).set_linger(Some(Duration::ZERO)).ok();
                }
            }
        }
    }

    fn pass_all(&self, bytes: &mut Vec<u8>) -> End {
        match self.preamble(bytes) {
            Ok(()) => {}
            Err(end) => return end,
        }
        loop {
            if let Err(end) = self.frame(bytes) {
                return end;
            }
        }
    }

    fn preamble(&self, bytes: &mut Vec<u8>) -> Result<(), End> {
        self.fill(bytes, PREAMBLE_LEN)?;
        if let Err(error) = Preamble::decode(bytes.first_chunk().unwrap()) {
            self.state.bad.lock().unwrap().push(format!("preamble: {error}"));
        }
        self.pass(bytes)
    }

    fn frame(&self, bytes: &mut Vec<u8>) -> Result<(), End> {
        self.fill(bytes, HEADER_LEN)?;
        let parsed = Header::decode(bytes.first_chunk().unwrap());
        let parsed = parsed.map(|header| HEADER_LEN + header.len as usize);
        let message = match parsed {
            Ok(len) => {
                self.fill(bytes, len)?;
                codec::parse(bytes).map(|(message, _)| message)
            }
            Err(error) => Err(error),
        };
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                self.state.bad.lock().unwrap().push(format!("frame: {error}"));
                return Err(End::Torn);
            }
        };
        let Some(trap) = self.sprung(&message) else { return self.pass(bytes) };
        if let Harm::Flip(seed) = trap.harm {
            let bit = seed as usize % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        if trap.moment == Moment::After {
            self.pass(bytes)?;
            std::thread::sleep(Duration::from_millis(AFTER_MS));
        }
        (trap.strike)();
        match trap.moment {
            Moment::Lost => Err(End::Torn),
            Moment::Before => self.pass(bytes),
            Moment::After => Ok(()),
        }
    }

    /// The trap, if this message is the one that it waits for.
    fn sprung(&self, message: &Message) -> Option<Trap> {
        let mut place = self.state.trap.lock().unwrap();
        let trap = place.as_mut()?;
        if !trap.point.is(message) {
            return None;
        }
        if trap.skip > 0 {
            trap.skip -= 1;
            return None;
        }
        place.take()
    }

    /// Whether this connection is over.
    fn look(&self) -> Result<(), End> {
        let cut = self.state.cuts.load(Ordering::Acquire) != self.cuts;
        let ended = self.state.ended.load(Ordering::Acquire);
        if cut || ended || self.torn.load(Ordering::Acquire) { Err(End::Torn) } else { Ok(()) }
    }

    fn wait_while_silent(&self) -> Result<(), End> {
        while self.state.silent.load(Ordering::Acquire) {
            self.look()?;
            std::thread::sleep(LOOK);
        }
        self.look()
    }

    /// Reads until there are `len` bytes.
    fn fill(&self, bytes: &mut Vec<u8>, len: usize) -> Result<(), End> {
        let mut have = bytes.len();
        bytes.resize(len, 0);
        while have < len {
            self.wait_while_silent()?;
            match (&self.ends[self.from]).read(&mut bytes[have..]) {
                Ok(0) if have == 0 => return Err(End::Closed),
                Ok(0) => return Err(End::Torn),
                Ok(count) => have += count,
                Err(error) if again(&error) => {}
                Err(_) => return Err(End::Torn),
            }
        }
        Ok(())
    }

    /// Writes all, and begins anew.
    fn pass(&self, bytes: &mut Vec<u8>) -> Result<(), End> {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            self.wait_while_silent()?;
            let speed = self.state.speed.load(Ordering::Acquire);
            let piece = if speed == 0 { rest.len() } else { rest.len().min(4096) };
            match (&self.ends[1 - self.from]).write(&rest[..piece]) {
                Ok(count) => {
                    rest = &rest[count..];
                    let pause = (count as u64 * 1_000_000).checked_div(speed).unwrap_or(0);
                    std::thread::sleep(Duration::from_micros(pause));
                }
                Err(error) if again(&error) => {}
                Err(_) => return Err(End::Torn),
            }
        }
        bytes.clear();
        Ok(())
    }
}

fn again(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
