// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared memory that goes away under us: SIGBUS becomes the loss of one mapping.
//!
//! The front-end owns the files behind guest memory, the dirty log and the in-flight region. If it cuts one, every
//! access past the new end raises SIGBUS, and so does a page that the host can no longer give (hugetlb and tmpfs
//! without space, a memory error). The kernel's own accesses only get `EFAULT`; ours would end the process, and with
//! it a disk that others may still be pulling from (docs/adr/0010-sigbus-is-a-lost-mapping.md).
//!
//! So each mapping is entered in a [`Watch`] table. The handler looks the faulting address up there, marks the
//! mapping as lost, puts a page of zeros over the one that is gone, and returns: the access goes on, with zeros that
//! mean nothing. Whoever acts on what it has read asks [`losses`] first. A fault at any other address is a bug: the
//! action that was there before gets it, which ends the process.
//!
//! *Rules of the handler.* It runs between any two instructions of any thread: no lock, no allocation, no log. The
//! table is an array of atomics, and the only calls are `mmap`, `sigaction` and `raise`.

use std::io;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut, with_exposed_provenance_mut};
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, fence};

/// Most mappings at a time: several memory tables of the largest size, for old ones live as long as their requests.
const SLOTS: usize = 4096;
/// Pages of a mapping that are replaced one by one; after that the whole rest goes at once, for each single page may
/// cost one of the process's 65530 areas.
const SINGLE_PAGES: u32 = 16;

/// A mapping in the table. `start` is 0 while the other fields mean nothing.
struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    /// Pages that were replaced; the mapping is lost if there is one.
    lost: AtomicU32,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicU32::new(0),
    }
}; SLOTS];
static LOSSES: AtomicU64 = AtomicU64::new(0);
/// The action before ours, once ours is there.
static BEFORE: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

/// Counts the pages that were lost, of all mappings of the process. What was read before the call is good if no
/// mapping that it came from is lost at the count that this returns: look at them again when it has changed.
#[must_use]
pub(super) fn losses() -> u64 {
    // After the loads before it, also where another thread took the fault.
    fence(Acquire);
    LOSSES.load(Relaxed)
}

/// An entry in the table. The mapping must be unmapped after it, and only then.
#[derive(Debug)]
pub(super) struct Watch {
    slot: usize,
}

impl Watch {
    /// Enters a mapping that begins at address `start`, with its page size. Its length is a multiple of that, or its
    /// last page is partly unused.
    ///
    /// # Errors
    /// The table is full, or the handler cannot be installed.
    pub(super) fn new(start: usize, len: usize, page: usize) -> io::Result<Self> {
        BEFORE.get_or_init(install).as_ref().map_err(|errno| io::Error::from_raw_os_error(*errno))?;
        let free = |slot: &Slot| slot.taken.compare_exchange(false, true, AcqRel, Relaxed).is_ok();
        let full = || io::Error::other("too many mappings of shared memory");
        let index = TABLE.iter().position(free).ok_or_else(full)?;
        let slot = &TABLE[index];
        slot.lost.store(0, Relaxed);
        slot.len.store(len, Relaxed);
        slot.page.store(page.max(1), Relaxed);
        slot.start.store(start, Release);
        Ok(Self { slot: index })
    }

    /// Whether a page of it was lost: then nothing that is read from it means anything.
    #[must_use]
    pub(super) fn is_lost(&self) -> bool {
        TABLE[self.slot].lost.load(Acquire) > 0
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let slot = &TABLE[self.slot];
        slot.start.store(0, SeqCst);
        slot.taken.store(false, Release);
    }
}

impl Slot {
    /// Start, length and page size, if `address` is inside.
    fn has(&self, address: usize) -> Option<(usize, usize, usize)> {
        let start = self.start.load(Acquire);
        let (len, page) = (self.len.load(Acquire), self.page.load(Acquire));
        // A slot that is being given to another mapping is not the one of this address: whoever faults holds his.
        let whole = start != 0 && start == self.start.load(Acquire);
        (whole && address.wrapping_sub(start) < len).then_some((start, len, page))
    }

    /// Replaces the page of `address`; returns whether that went well.
    fn replace(&self, address: usize, (start, len, page): (usize, usize, usize)) -> bool {
        // Marked first: who sees the zeros must see the mark too.
        let before = self.lost.load(SeqCst);
        if before < SINGLE_PAGES {
            self.lost.fetch_add(1, SeqCst);
        }
        LOSSES.fetch_add(1, SeqCst);
        let skip = (address - start) / page * page;
        let rest = len.saturating_sub(skip).div_ceil(page).saturating_mul(page);
        let size = if before < SINGLE_PAGES { page } else { rest };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let at = with_exposed_provenance_mut(start + skip);
        // SAFETY: whole pages of a mapping that is in the table and therefore mapped, by whoever faults in it; its
        // users access it by atomic operations, and expect any content.
        let mapped = unsafe { libc::mmap(at, size, prot, flags, -1, 0) };
        mapped != libc::MAP_FAILED
    }
}

/// Installs the handler; returns the action that was there before.
fn install() -> Result<libc::sigaction, i32> {
    let errno = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only asks for the current action.
    if unsafe { libc::sigaction(libc::SIGBUS, null(), before.as_mut_ptr()) } != 0 {
        return Err(errno());
    }
    // SAFETY: all zeros is a valid action, and `sigaction` has filled it in.
    let before = unsafe { before.assume_init() };
    let mut action = before;
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    // On the thread's signal stack, which the standard library gives to every thread.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the set belongs to `action`.
    unsafe { libc::sigemptyset(&raw mut action.sa_mask) };
    // SAFETY: the handler has the type that SA_SIGINFO asks for, and does only what a handler may. A fault before
    // `BEFORE` is set cannot be of a mapping in the table, and is told to the default action.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) } != 0 {
        return Err(errno());
    }
    Ok(before)
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: it is valid for as long as the thread lives.
    let kept = unsafe { *errno };
    // SAFETY: the kernel gives a valid `siginfo_t` to a handler with SA_SIGINFO.
    let info = unsafe { &*info };
    // A positive code is the kernel's: a fault, with an address.
    let code = info.si_code;
    // SAFETY: for a fault the field is set, for other signals it is some number that is not looked at.
    let address = if code > 0 { unsafe { info.si_addr() }.addr() } else { 0 };
    let found = TABLE.iter().find_map(|slot| Some((slot, slot.has(address)?)));
    if !found.is_some_and(|(slot, mapping)| slot.replace(address, mapping)) {
        give_back(signal, code);
    }
    // SAFETY: as above.
    unsafe { *errno = kept };
}

/// Not ours. A fault comes again when the handler returns, and then meets the action that was before ours. A signal
/// that somebody sent, or a memory error that nobody has run into yet, does not come again: it ends the process here,
/// for the standard library's action takes everything for a fault.
fn give_back(signal: i32, code: i32) {
    let comes_again = code > 0 && code != libc::BUS_MCEERR_AO;
    let action = match BEFORE.get() {
        Some(Ok(before)) if comes_again => *before,
        // SAFETY: all zeros is a valid action: the default one.
        _ => unsafe { MaybeUninit::zeroed().assume_init() },
    };
    // SAFETY: an action that the kernel has given out, or the default one.
    unsafe { libc::sigaction(signal, &raw const action, null_mut()) };
    if !comes_again {
        // SAFETY: a plain signal to this thread; it stays blocked until the handler returns.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]
    use super::super::mapping::Mapping;
    use super::super::memory::tests::memory_file;
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::sync::atomic::AtomicU8;

    const PAGE: usize = 4096;

    fn byte(map: &Mapping, at: usize) -> &AtomicU8 {
        // SAFETY: the tests stay inside the mapping, and access it by atomic operations.
        unsafe { AtomicU8::from_ptr(with_exposed_provenance_mut(map.host() + at)) }
    }

    /// Areas of this process that begin inside the range.
    fn areas(start: usize, len: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = maps.lines().filter_map(|line| usize::from_str_radix(line.split('-').next()?, 16).ok());
        starts.filter(|at| (start..start + len).contains(at)).count()
    }

    #[test]
    fn a_file_that_is_cut_is_a_lost_mapping_and_the_rest_of_it_stays() {
        let (file, other) = (memory_file(8 << 12), memory_file(4096));
        let (map, whole) = (Mapping::new(&file, 0, 8 << 12).unwrap(), Mapping::new(&other, 0, 4096).unwrap());
        (0..8).for_each(|page| byte(&map, page * PAGE).store(7, Relaxed));
        byte(&whole, 9).store(8, Relaxed);
        let before = losses();
        assert!(!map.is_lost());
        file.set_len(2 << 12).unwrap();
        assert_eq!(byte(&map, 5 * PAGE).load(Relaxed), 0);
        assert!(map.is_lost() && losses() > before && !whole.is_lost());
        byte(&map, 7 * PAGE + 4095).store(9, Relaxed);
        assert_eq!(byte(&map, 7 * PAGE + 4095).load(Relaxed), 9);
        assert_eq!(byte(&map, PAGE).load(Relaxed), 7);
        assert_eq!(byte(&whole, 9).load(Relaxed), 8);
        // The place in the table is free again, and a new mapping is whole.
        drop(map);
        file.set_len(8 << 12).unwrap();
        assert!(!Mapping::new(&file, 0, 8 << 12).unwrap().is_lost());
    }

    #[test]
    fn many_lost_pages_cost_few_areas_whatever_their_order() {
        const PAGES: usize = 4096;
        let file = memory_file((PAGES * PAGE) as u64);
        let map = Mapping::new(&file, 0, (PAGES * PAGE) as u64).unwrap();
        file.set_len(0).unwrap();
        for page in (0..PAGES).step_by(2).chain((1..PAGES).step_by(2).rev()) {
            byte(&map, page * PAGE).fetch_add(1, Relaxed);
        }
        let areas = areas(map.host(), PAGES * PAGE);
        assert!(areas <= 2 * SINGLE_PAGES as usize + 3, "{areas} areas");
    }

    #[test]
    fn threads_that_fault_at_once_go_on() {
        let file = memory_file(64 << 12);
        let map = Mapping::new(&file, 0, 64 << 12).unwrap();
        file.set_len(0).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..64).for_each(|page| assert_eq!(byte(&map, page * PAGE).load(Relaxed), 0)));
            }
        });
        assert!(map.is_lost());
    }

    #[test]
    fn a_huge_page_is_replaced_whole() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = File::from(memfd_create("huge", flags).expect("the kernel has no hugetlbfs"));
        file.set_len(4 << 20).unwrap();
        let map = Mapping::new(&file, 0, 4 << 20).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(byte(&map, (2 << 20) + 12345).load(Relaxed), 0);
        byte(&map, (4 << 20) - 1).store(1, Relaxed);
        byte(&map, 0).store(1, Relaxed);
        assert!(map.is_lost());
    }

    /// Runs the test of this name in a process of its own, in which it does what its body says.
    fn child(name: &str) -> std::process::ExitStatus {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let name = format!("frontend::sigbus::tests::{name}");
        command.args([&name, "--exact", "--nocapture"]).env("BLKFERRY_SIGBUS_CHILD", "1");
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command.status().unwrap()
    }

    fn is_child() -> bool {
        std::env::var_os("BLKFERRY_SIGBUS_CHILD").is_some()
    }

    #[test]
    fn a_full_table_refuses_and_forgets_nobody() {
        if !is_child() {
            // The table is the process's, and the other tests need it.
            return assert!(child("a_full_table_refuses_and_forgets_nobody").success());
        }
        let watches: Vec<_> = (0..=SLOTS).map_while(|_| Watch::new(1, 0, PAGE).ok()).collect();
        assert_eq!(watches.len(), SLOTS);
        assert!(Mapping::new(&memory_file(4096), 0, 4096).is_err());
        drop(watches);
        assert!(Mapping::new(&memory_file(4096), 0, 4096).is_ok());
    }

    #[test]
    fn a_fault_elsewhere_still_ends_the_process() {
        if !is_child() {
            let status = child("a_fault_elsewhere_still_ends_the_process");
            return assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        }
        let file = memory_file(4096);
        let map = Mapping::new(&file, 0, 4096).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(byte(&map, 0).load(Relaxed), 0);
        let (prot, flags) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { rustix::mm::mmap(null_mut(), 4096, prot, flags, &file, 0) }.unwrap();
        // SAFETY: it is mapped; there is nothing behind it, which is the point.
        let _ = unsafe { AtomicU8::from_ptr(at.cast()) }.load(Relaxed);
    }

    #[test]
    fn a_signal_that_somebody_sends_still_ends_the_process() {
        if !is_child() {
            let status = child("a_signal_that_somebody_sends_still_ends_the_process");
            return assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        }
        let file = memory_file(4096);
        let _map = Mapping::new(&file, 0, 4096).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        // SAFETY: a signal to this process.
        unsafe { libc::kill(own, libc::SIGBUS) };
        std::thread::sleep(std::time::Duration::from_secs(20));
    }
}
