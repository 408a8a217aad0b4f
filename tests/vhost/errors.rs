// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files that fail, by real means: a full file system, a limit on the size of files, a file that is cut, a disk that
//! answers with errors. The guest hears of it, what was there stays, and afterwards all is well again.

use crate::guest::{Ask, Guest, IOERR, OK, T_DISCARD, T_WRITE_ZEROES, pattern};
use crate::raw::{alone, sh, with_mounts};
use crate::rig::{Rig, Setup};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

const CHUNK: usize = 64 << 10;
const SECTORS: u64 = CHUNK as u64 / 512;
/// Largest request of the guest in this folder.
const SLOT: usize = 16 << 10;

fn setup(state: &Path, size: u64) -> Setup {
    Setup { size, chunk_size: Some(CHUNK as u32), state: Some(state.to_owned()), ..Setup::default() }
}

fn started(setup: Setup) -> (Rig, Guest) {
    let rig = Rig::new(setup);
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.start_fresh();
    (rig, guest)
}

/// Writes a chunk in four requests; returns their statuses.
fn write_chunk(guest: &mut Guest, chunk: u64, data: &[u8]) -> Vec<u8> {
    let parts = (0u64..).zip(data.chunks(SLOT));
    parts.map(|(n, part)| guest.ask(0, &Ask::Out(chunk * SECTORS + 32 * n, part)).status).collect()
}

fn read_chunk(guest: &mut Guest, chunk: u64) -> Vec<u8> {
    let part = |n: u64| {
        let done = guest.ask(0, &Ask::In(chunk * SECTORS + 32 * n, SLOT));
        assert_eq!(done.status, OK, "chunk {chunk}");
        done.data
    };
    (0..4u64).flat_map(part).collect()
}

fn data(chunk: u64) -> Vec<u8> {
    pattern(CHUNK, chunk * 7 + 1)
}

/// Writes zeros to a file until the file system is full to the last block.
fn fill(path: &Path) -> File {
    let mut file = File::create(path).unwrap();
    for block in [1 << 20, 4096, 1] {
        let zeros = vec![0; block];
        while file.write_all(&zeros).is_ok() {}
    }
    file
}

fn journal_bytes(state: &Path) -> u64 {
    let files = std::fs::read_dir(state).unwrap().map(|entry| entry.unwrap());
    let journals = files.filter(|file| file.file_name().to_string_lossy().starts_with("journal."));
    journals.map(|file| file.metadata().unwrap().len()).sum()
}

/// What a chunk with failed writes may hold: each sector new or never written.
fn assert_no_ghost(found: &[u8], written: &[u8], chunk: u64) {
    for (found, written) in found.chunks(512).zip(written.chunks(512)) {
        assert!(found == written || found.iter().all(|byte| *byte == 0), "chunk {chunk}");
    }
}

#[test]
fn a_full_file_system_fails_writes_and_nothing_else() {
    if let Some(status) =
        with_mounts("errors::a_full_file_system_fails_writes_and_nothing_else", &["--map-root-user"])
    {
        return assert!(status.success(), "{status} (mounts need root or user namespaces)");
    }
    const CHUNKS: u64 = 512;
    let dir = tempfile::tempdir().unwrap();
    sh("mount", &["-t", "tmpfs", "-o", "size=8m", "none", dir.path().to_str().unwrap()]);
    let state = dir.path().join("state");
    let (rig, mut guest) = started(setup(&state, CHUNKS * CHUNK as u64));
    for chunk in 0..16 {
        assert_eq!(write_chunk(&mut guest, chunk, &data(chunk)), [OK; 4]);
    }
    assert_eq!(guest.ask(0, &Ask::Flush).status, OK);
    let filler = fill(&dir.path().join("filler"));
    // The first ones fail for lack of data blocks, the later ones because the journal has no room any more.
    let journal = journal_bytes(&state);
    let mut failed = Vec::new();
    for chunk in 16..500 {
        let status = guest.ask(0, &Ask::Out(chunk * SECTORS, &data(chunk)[..SLOT])).status;
        assert_eq!(status, IOERR, "chunk {chunk}");
        failed.push(read_chunk(&mut guest, chunk));
        assert_no_ghost(&failed[failed.len() - 1], &data(chunk), chunk);
    }
    let grown = journal_bytes(&state) - journal;
    assert!(grown <= 4096, "the journal has grown by {grown} bytes: it was never full");
    for chunk in 0..16 {
        assert!(read_chunk(&mut guest, chunk) == data(chunk), "chunk {chunk} while it is full");
        // What has its blocks can be written.
        assert_eq!(write_chunk(&mut guest, chunk, &data(chunk + 1)), [OK; 4]);
    }
    // Cannot be noted either; if it can, because a block has come free, that is fine too.
    guest.ask(0, &Ask::Zero(T_DISCARD, &[(15 * SECTORS, SECTORS as u32, 0)]));
    filler.set_len(0).unwrap();
    for (chunk, found) in (16..500).zip(failed) {
        assert!(read_chunk(&mut guest, chunk) == found, "chunk {chunk} has changed by itself");
    }
    for chunk in 15..40 {
        assert_eq!(write_chunk(&mut guest, chunk, &data(chunk + 1)), [OK; 4], "chunk {chunk}");
    }
    assert_eq!(guest.ask(0, &Ask::Flush).status, OK);
    assert!(rig.volume.fault().is_none(), "{:?}", rig.volume.fault());
    guest.stop();
    rig.close();
    let (_rig, mut guest) = started(setup(&state, CHUNKS * CHUNK as u64));
    for chunk in 0..40 {
        assert!(read_chunk(&mut guest, chunk) == data(chunk + 1), "chunk {chunk} after a restart");
    }
    for chunk in 40..500 {
        assert_no_ghost(&read_chunk(&mut guest, chunk), &data(chunk), chunk);
    }
}

#[test]
fn a_write_that_fails_half_way_leaves_no_ghost() {
    if let Some(status) = alone("errors::a_write_that_fails_half_way_leaves_no_ghost") {
        return assert!(status.success(), "{status}");
    }
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let (rig, mut guest) = started(setup(&state, 16 << 20));
    assert_eq!(write_chunk(&mut guest, 200, &data(200)), [OK; 4]);
    // From here on no write goes past the middle of a request: the kernel writes half of it, then says EFBIG.
    let limit = (100 * CHUNK + SLOT + SLOT / 2) as u64;
    // SAFETY: no handler is replaced that anything here needs; the process is this test's alone.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let set = |soft| {
        let limits = libc::rlimit { rlim_cur: soft, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: only reads the structure.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limits) }, 0);
    };
    set(limit);
    assert_eq!(write_chunk(&mut guest, 100, &data(100)), [OK, IOERR, IOERR, IOERR]);
    assert_eq!(write_chunk(&mut guest, 101, &data(101)), [IOERR; 4]);
    assert_eq!(write_chunk(&mut guest, 99, &data(99)), [OK; 4]);
    let found = read_chunk(&mut guest, 100);
    assert!(found[..SLOT] == data(100)[..SLOT]);
    assert_no_ghost(&found, &data(100), 100);
    assert_no_ghost(&read_chunk(&mut guest, 101), &data(101), 101);
    assert!(read_chunk(&mut guest, 200) == data(200));
    set(libc::RLIM_INFINITY);
    assert!(read_chunk(&mut guest, 100) == found, "it has changed by itself");
    // A neighbour is written: what failed must not come back with it.
    assert_eq!(guest.ask(0, &Ask::Out(101 * SECTORS, &pattern(512, 3))).status, OK);
    assert_no_ghost(&read_chunk(&mut guest, 101)[512..], &data(101)[512..], 101);
    assert_eq!(guest.ask(0, &Ask::Flush).status, OK);
    guest.stop();
    rig.close();
    let (_rig, mut guest) = started(setup(&state, 16 << 20));
    assert!(read_chunk(&mut guest, 100) == found, "after a restart");
    assert!(read_chunk(&mut guest, 99) == data(99));
}

#[test]
fn a_layer_that_is_cut_fails_what_is_past_its_end() {
    let (rig, mut guest) = started(Setup { chunk_size: Some(CHUNK as u32), ..Setup::default() });
    for chunk in 0..32 {
        assert_eq!(write_chunk(&mut guest, chunk, &data(chunk)), [OK; 4]);
    }
    let layer = OpenOptions::new().write(true).open(rig.dir.path().join("state/layer")).unwrap();
    layer.set_len(16 * CHUNK as u64 + 8192).unwrap();
    for chunk in 0..16 {
        assert!(read_chunk(&mut guest, chunk) == data(chunk));
    }
    assert!(guest.ask(0, &Ask::In(16 * SECTORS, 8192)).data == data(16)[..8192]);
    for sector in [16 * SECTORS + 8, 16 * SECTORS + 16, 20 * SECTORS] {
        assert_eq!(guest.ask(0, &Ask::In(sector, SLOT)).status, IOERR, "sector {sector}");
    }
    // Chunks that were never written have nothing in the layer.
    assert!(read_chunk(&mut guest, 40) == vec![0; CHUNK]);
    assert_eq!(write_chunk(&mut guest, 3, &data(4)), [OK; 4]);
    assert!(read_chunk(&mut guest, 3) == data(4));
}

#[test]
fn a_base_image_that_is_cut_fails_what_is_past_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    std::fs::write(&base, (0..32).flat_map(data).collect::<Vec<_>>()).unwrap();
    let setup = Setup {
        size: 32 * CHUNK as u64,
        chunk_size: Some(CHUNK as u32),
        base: Some(base.clone()),
        ..Setup::default()
    };
    let (_rig, mut guest) = started(setup);
    assert!(read_chunk(&mut guest, 31) == data(31));
    OpenOptions::new().write(true).open(&base).unwrap().set_len(16 * CHUNK as u64).unwrap();
    assert!(read_chunk(&mut guest, 15) == data(15));
    assert_eq!(guest.ask(0, &Ask::In(16 * SECTORS, SLOT)).status, IOERR);
    assert_eq!(write_chunk(&mut guest, 20, &data(1)), [OK; 4]);
    assert!(read_chunk(&mut guest, 20) == data(1), "whole chunks need no base");
}

/// A disk in a file whose end is gone; the file system on it does not know.
struct BrokenDisk {
    device: String,
    mount: PathBuf,
    file: PathBuf,
}

impl BrokenDisk {
    fn new(dir: &Path, bytes: u64) -> Self {
        let (mount, file) = (dir.join("mount"), dir.join("disk"));
        std::fs::create_dir(&mount).unwrap();
        File::create(&file).unwrap().set_len(bytes).unwrap();
        sh("mkfs.ext4", &["-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", file.to_str().unwrap()]);
        let arguments = ["--find", "--show", "--direct-io=on", file.to_str().unwrap()];
        let device = sh("losetup", &arguments);
        sh("mount", &["-o", "errors=continue", &device, mount.to_str().unwrap()]);
        Self { device, mount, file }
    }
}

impl Drop for BrokenDisk {
    fn drop(&mut self) {
        sh("umount", &["--lazy", self.mount.to_str().unwrap()]);
        sh("losetup", &["--detach", &self.device]);
    }
}

#[test]
fn a_disk_that_answers_with_errors_fails_the_reads_that_it_fails() {
    const NAME: &str = "errors::a_disk_that_answers_with_errors_fails_the_reads_that_it_fails";
    if let Some(status) = with_mounts(NAME, &[]) {
        return assert!(status.success(), "{status} (a loop device needs root)");
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = BrokenDisk::new(dir.path(), 64 << 20);
    let (rig, mut guest) = started(setup(&disk.mount.join("state"), 32 << 20));
    for chunk in 0..256 {
        assert_eq!(write_chunk(&mut guest, chunk, &data(chunk)), [OK; 4]);
    }
    assert_eq!(guest.ask(0, &Ask::Flush).status, OK);
    sh("sync", &[]);
    OpenOptions::new().write(true).open(&disk.file).unwrap().set_len(12 << 20).unwrap();
    let mut failed = 0;
    for chunk in 0..256 {
        for part in 0..4 {
            let done = guest.ask(0, &Ask::In(chunk * SECTORS + 32 * part, SLOT));
            match done.status {
                OK => assert!(done.data == data(chunk)[part as usize * SLOT..][..SLOT], "chunk {chunk}"),
                status => assert_eq!(status, IOERR),
            }
            failed += u32::from(done.status != OK);
        }
    }
    assert!(failed > 100, "{failed} reads failed: that was no broken disk");
    assert_eq!(guest.ask(0, &Ask::Zero(T_WRITE_ZEROES, &[(0, 8, 0)])).status, OK);
    guest.stop();
    rig.close();
}
