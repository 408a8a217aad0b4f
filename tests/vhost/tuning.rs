// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How the queue threads run must not change what they do: pinned memory, busy-poll, CPU binding.

use crate::guest::{Ask, Guest, IOERR, OK, pattern};
use crate::rig::{Rig, Setup};
use blkferry::config::QueueTuning;
use vhost::vhost_user::VhostUserFrontend;

/// CPU numbers that this process may run on.
fn cpus() -> Vec<u16> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let number = |text: &str| text.trim().parse().unwrap();
    list.split(',')
        .flat_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            number(first)..=number(last)
        })
        .collect()
}

/// CPUs that threads of a queue 0 may run on, as the kernel has them; other tests may have such threads too.
fn allowed_of_queues_0() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default())
        .filter(|status| status.starts_with("Name:\tqueue-0\n"))
        .filter_map(|status| {
            status.lines().find_map(|line| Some(line.strip_prefix("Cpus_allowed_list:\t")?.to_owned()))
        })
        .collect()
}

fn exercise(tuning: QueueTuning) {
    let what = format!("{tuning:?}");
    let rig = Rig::new(Setup { tuning, ..Setup::default() });
    let mut guest = Guest::connect(&rig.socket(), 1);
    guest.set_up(&[0]);
    guest.enable(true).unwrap();
    for life in 0..3u64 {
        for n in 0..100u64 {
            let data = pattern(4096 << (n % 3), life << 8 | n);
            guest.high = n % 2 == 0;
            assert_eq!(guest.ask(0, &Ask::Out(n * 64, &data)).status, OK, "{what}");
            assert!(guest.ask(0, &Ask::In(n * 64, data.len())).data == data, "{what}");
        }
        // Memory that goes and comes back is not the pinned one any more.
        let [_, high] = guest.memory.regions();
        guest.high = true;
        guest.link.remove_mem_region(&high).unwrap();
        assert_eq!(guest.ask(0, &Ask::In(0, 4096)).status, IOERR, "{what}");
        guest.link.add_mem_region(&high).unwrap();
        assert!(guest.ask(0, &Ask::In(0, 4096)).data == pattern(4096, life << 8), "{what}");
        let bases = guest.stop();
        guest.start(&bases);
    }
}

#[test]
fn pinned_memory_follows_the_memory_table() {
    exercise(QueueTuning { register_memory: true, ..QueueTuning::default() });
}

#[test]
fn a_polling_queue_serves_and_hears_commands() {
    exercise(QueueTuning { poll_us: 200, ..QueueTuning::default() });
}

#[test]
fn a_queue_runs_on_its_cpu() {
    let cpu = *cpus().last().unwrap();
    let tuning = QueueTuning { cpus: vec![cpu], ..QueueTuning::default() };
    let rig = Rig::new(Setup { tuning: tuning.clone(), ..Setup::default() });
    assert!(allowed_of_queues_0().contains(&cpu.to_string()), "{:?}", allowed_of_queues_0());
    drop(rig);
    exercise(QueueTuning { register_memory: true, poll_us: 50, ..tuning });
}
