// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What to do next with a set of disks and the VM that they belong to. A function of what is known now and of nothing
//! else: no clock, no socket, no memory of its own.
//!
//! The VM needs all of its disks on one side. Each disk has an arbiter of its own, its source, so the set can fall apart
//! (T20), and this is what it rests on:
//!
//! - A disk that is *here* (armed, pushed, offered) can be taken back by its source alone, at any time.
//! - A disk that is *away* (granted) can only go on to its end.
//! - So as long as none is away, a failure brings all back; from the first grant on, all go forward, and nothing is
//!   cancelled any more: a disk that was taken back then would be missing where the VM runs.
//! - Disks are granted when the VM starts at the destination. With several disks QEMU is held before that, with the VM
//!   stopped, until every disk is prepared at its destination; else it is cancelled.
//! - QEMU is cancelled first and its end is awaited, then the disks: see [`super`].
//!
//! Rejected: asking the destinations' daemons as well. Their API need not be reachable from here, and they decide
//! nothing.

/// Where a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Armed here; the peers have not agreed.
    Arming,
    /// The peers have agreed; the guest's disk is here.
    Agreed,
    /// Offered to the destination; the source can still take it back.
    Offered {
        /// The destination is connected and holds the offer durably.
        prepared: bool,
    },
    /// The destination owns it and pulls.
    Away,
    /// All of it is at the destination.
    Done,
    /// The migration ended here, failed or cancelled.
    Back,
}

/// What became of the wish to cancel a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// Never asked, or to be asked again now.
    Possible,
    /// Asked; the answer or its effect is awaited.
    Pending,
    /// The daemon will not.
    Denied,
    /// The daemon accepted, long ago, and nothing came of it.
    Overdue,
}

/// A disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Where it is, or was when its daemon was last heard.
    pub at: At,
    /// Its daemon here has not been heard for too long.
    pub lost: bool,
    /// The wish to cancel it.
    pub cancel: Cancel,
}

impl Disk {
    /// Whether its migration is under way and can still end here.
    fn here(self) -> bool {
        matches!(self.at, At::Arming | At::Agreed | At::Offered { .. })
    }

    /// Whether it cannot come back any more.
    pub(super) fn away(self) -> bool {
        matches!(self.at, At::Away | At::Done)
    }

    /// Whether it cannot go on as things are. A daemon that has given everything away may go.
    pub(super) fn broken(self) -> bool {
        (self.lost && self.at != At::Done) || self.at == At::Back
    }
}

/// Whether QEMU was asked to cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// It was not.
    No,
    /// It was.
    Yes,
    /// Long ago.
    Overdue,
}

/// What QEMU's side of the migration is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vm {
    /// Somebody else moves the VM, or nobody.
    Absent,
    /// Not started.
    Waiting,
    /// Started.
    Running(Asked),
    /// The VM has stopped; QEMU waits for leave to let the destination start.
    Held {
        /// Whether it was asked to cancel.
        asked: Asked,
        /// It has waited for long enough: the guest stands still.
        overdue: bool,
    },
    /// QEMU has sent the VM away.
    Completed,
    /// QEMU had sent the VM away, and somebody has let it run here again.
    Resumed,
    /// It failed, was cancelled, or never began: the VM is here.
    Stopped,
    /// The monitor went away in the middle.
    Lost {
        /// Long ago.
        overdue: bool,
    },
}

/// Why something is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A disk failed, was cancelled, or its daemon is gone.
    Disk,
    /// A disk was not prepared in time when the VM had stopped.
    NotPrepared,
    /// QEMU's migration did not complete.
    VmStopped,
    /// The VM was resumed here.
    VmResumed,
    /// The monitor went away before the switchover.
    VmLost,
    /// The monitor went away in the switchover, and no VM has started anywhere.
    VmLostInSwitchover,
    /// QEMU does not cancel.
    VmStuck,
    /// A cancel had no effect.
    CancelOverdue,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing until something changes.
    Wait,
    /// Let QEMU begin.
    StartVm,
    /// Let QEMU finish: every disk is prepared.
    ContinueVm,
    /// Cancel QEMU.
    CancelVm(Why),
    /// Cancel every disk that is here.
    CancelDisks(Why),
    /// Nothing more can come.
    End(Option<Why>),
}

/// What to do next.
#[must_use]
pub fn decide(disks: &[Disk], vm: Vm) -> Step {
    let away = disks.iter().any(|disk| disk.away());
    let broken = disks.iter().any(|disk| disk.broken());
    match vm {
        Vm::Running(Asked::No) | Vm::Held { asked: Asked::No, .. } if broken && !away => {
            Step::CancelVm(Why::Disk)
        }
        Vm::Held { asked: Asked::No, overdue } => held(disks, overdue),
        Vm::Running(Asked::Overdue) | Vm::Held { asked: Asked::Overdue, .. } => {
            if disks.iter().any(|disk| disk.here() && !disk.lost && disk.cancel == Cancel::Pending) {
                Step::Wait
            } else {
                Step::End(Some(Why::VmStuck))
            }
        }
        Vm::Running(_) | Vm::Held { .. } => Step::Wait,
        Vm::Waiting | Vm::Absent | Vm::Completed if broken => back(disks, Why::Disk),
        Vm::Waiting if disks.iter().any(|disk| disk.at == At::Arming) => Step::Wait,
        Vm::Waiting if disks.iter().any(|disk| disk.at != At::Done) => Step::StartVm,
        Vm::Waiting | Vm::Absent | Vm::Completed => forward(disks),
        Vm::Resumed | Vm::Stopped => {
            let why = if vm == Vm::Resumed { Why::VmResumed } else { Why::VmStopped };
            if away { Step::End(Some(why)) } else { back(disks, why) }
        }
        Vm::Lost { overdue } => {
            let offered = disks.iter().any(|disk| matches!(disk.at, At::Offered { .. }));
            match (away || offered, offered && overdue) {
                (true, true) => Step::End(Some(Why::VmLostInSwitchover)),
                (true, false) => forward(disks),
                (false, _) => back(disks, Why::VmLost),
            }
        }
    }
}

/// The VM has stopped for the switchover: once QEMU goes on, a disk may be granted at any moment.
fn held(disks: &[Disk], overdue: bool) -> Step {
    let away = disks.iter().any(|disk| disk.away());
    let ready = |disk: &Disk| disk.away() || disk.at == At::Offered { prepared: true };
    match (disks.iter().all(ready), overdue) {
        (true, _) => Step::ContinueVm,
        (false, false) => Step::Wait,
        // Somebody else has let a destination start: there is no way back for that disk.
        (false, true) if away => Step::ContinueVm,
        (false, true) => Step::CancelVm(Why::NotPrepared),
    }
}

/// Brings every disk back, unless one of them cannot come back: then all the others must follow that one.
fn back(disks: &[Disk], why: Why) -> Step {
    if disks.iter().any(|disk| disk.away()) {
        return forward(disks);
    }
    let waits = |cancel| disks.iter().any(|disk| disk.here() && !disk.lost && disk.cancel == cancel);
    if waits(Cancel::Possible) {
        Step::CancelDisks(why)
    } else if waits(Cancel::Pending) {
        Step::Wait
    } else if waits(Cancel::Overdue) {
        Step::End(Some(Why::CancelOverdue))
    } else {
        Step::End(Some(why))
    }
}

/// Waits until each disk is at its end.
fn forward(disks: &[Disk]) -> Step {
    if disks.iter().any(|disk| disk.here() && disk.cancel == Cancel::Overdue) {
        Step::End(Some(Why::CancelOverdue))
    } else if disks.iter().any(|disk| !disk.broken() && disk.at != At::Done) {
        Step::Wait
    } else {
        Step::End(disks.iter().any(|disk| disk.broken()).then_some(Why::Disk))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use super::*;

    const ATS: [At; 7] = [
        At::Arming,
        At::Agreed,
        At::Offered { prepared: false },
        At::Offered { prepared: true },
        At::Away,
        At::Done,
        At::Back,
    ];
    const CANCELS: [Cancel; 4] = [Cancel::Possible, Cancel::Pending, Cancel::Denied, Cancel::Overdue];
    const VMS: [Vm; 16] = [
        Vm::Absent,
        Vm::Waiting,
        Vm::Running(Asked::No),
        Vm::Running(Asked::Yes),
        Vm::Running(Asked::Overdue),
        Vm::Held { asked: Asked::No, overdue: false },
        Vm::Held { asked: Asked::No, overdue: true },
        Vm::Held { asked: Asked::Yes, overdue: false },
        Vm::Held { asked: Asked::Yes, overdue: true },
        Vm::Held { asked: Asked::Overdue, overdue: false },
        Vm::Held { asked: Asked::Overdue, overdue: true },
        Vm::Completed,
        Vm::Resumed,
        Vm::Stopped,
        Vm::Lost { overdue: false },
        Vm::Lost { overdue: true },
    ];

    fn all_disks() -> Vec<Disk> {
        let mut all = Vec::new();
        for at in ATS {
            for lost in [false, true] {
                all.extend(CANCELS.map(|cancel| Disk { at, lost, cancel }));
            }
        }
        all
    }

    /// Calls `check` with every set of two disks and every VM.
    fn each(check: impl Fn(&[Disk], Vm, Step)) {
        let all = all_disks();
        for first in &all {
            for second in &all {
                for vm in VMS {
                    let disks = [*first, *second];
                    check(&disks, vm, decide(&disks, vm));
                }
            }
        }
    }

    #[test]
    fn t20_nothing_is_cancelled_once_a_disk_is_away() {
        each(|disks, vm, step| {
            if disks.iter().any(|disk| disk.away()) {
                let cancels = matches!(step, Step::CancelVm(_) | Step::CancelDisks(_));
                assert!(!cancels, "{disks:?} {vm:?}: {step:?}");
            }
        });
    }

    #[test]
    fn t20_no_disk_is_cancelled_while_qemu_may_still_switch_over() {
        each(|disks, vm, step| {
            let may = matches!(vm, Vm::Running(_) | Vm::Held { .. } | Vm::Completed);
            if may && matches!(step, Step::CancelDisks(_)) {
                // After `completed` only because a disk cannot come any more.
                let lacks = disks.iter().any(|disk| disk.broken());
                assert!(vm == Vm::Completed && lacks, "{disks:?} {vm:?}: {step:?}");
            }
        });
    }

    #[test]
    fn t20_qemu_goes_on_only_with_every_disk() {
        each(|disks, vm, step| match step {
            Step::StartVm => {
                assert_eq!(vm, Vm::Waiting);
                let ready = disks.iter().all(|disk| !disk.broken() && disk.at != At::Arming);
                assert!(ready, "{disks:?}");
            }
            Step::ContinueVm if !disks.iter().any(|disk| disk.away()) => {
                let ready = disks.iter().all(|disk| !disk.lost && disk.at == At::Offered { prepared: true });
                assert!(ready && matches!(vm, Vm::Held { asked: Asked::No, .. }), "{disks:?} {vm:?}");
            }
            _ => {}
        });
    }

    #[test]
    fn t20_a_broken_disk_brings_the_others_back_or_the_end() {
        each(|disks, vm, step| {
            let (away, broken) =
                (disks.iter().any(|disk| disk.away()), disks.iter().any(|disk| disk.broken()));
            if broken && !away {
                let good = match step {
                    Step::CancelVm(_) | Step::CancelDisks(_) | Step::End(Some(_)) => true,
                    // For QEMU's end, a cancel's effect, or whoever has the VM that is being switched over.
                    Step::Wait => {
                        matches!(vm, Vm::Running(_) | Vm::Held { .. } | Vm::Lost { .. })
                            || disks.iter().any(|disk| disk.cancel == Cancel::Pending)
                    }
                    Step::StartVm | Step::ContinueVm | Step::End(None) => false,
                };
                assert!(good, "{disks:?} {vm:?}: {step:?}");
            }
        });
    }

    #[test]
    fn success_is_every_disk_at_the_destination_and_no_failure_of_qemu() {
        each(|disks, vm, step| {
            let done = disks.iter().all(|disk| disk.at == At::Done);
            let good = matches!(vm, Vm::Absent | Vm::Waiting | Vm::Completed | Vm::Lost { .. });
            let calm = disks.iter().all(|disk| disk.cancel != Cancel::Overdue);
            if step == Step::End(None) {
                assert!(done && good, "{disks:?} {vm:?}");
            } else if done && good && calm {
                panic!("{disks:?} {vm:?}: {step:?}");
            }
        });
    }

    #[test]
    fn the_order_of_the_disks_does_not_matter() {
        each(|disks, vm, step| assert_eq!(decide(&[disks[1], disks[0]], vm), step, "{disks:?} {vm:?}"));
    }

    /// The named cases, in the order in which they can happen.
    #[test]
    fn the_matrix() {
        use At::{Agreed, Arming, Away, Back, Done};
        let (offered, prepared) = (At::Offered { prepared: false }, At::Offered { prepared: true });
        let held = |overdue| Vm::Held { asked: Asked::No, overdue };
        let (run, asked) = (Vm::Running(Asked::No), Vm::Running(Asked::Yes));
        let rows = [
            ([Agreed, Arming], Vm::Waiting, Step::Wait),
            ([Agreed, Agreed], Vm::Waiting, Step::StartVm),
            ([Agreed, Back], Vm::Waiting, Step::CancelDisks(Why::Disk)),
            ([Back, Back], Vm::Waiting, Step::End(Some(Why::Disk))),
            ([Agreed, offered], run, Step::Wait),
            ([Agreed, Back], run, Step::CancelVm(Why::Disk)),
            ([Agreed, Back], asked, Step::Wait),
            ([Agreed, Back], Vm::Stopped, Step::CancelDisks(Why::VmStopped)),
            ([prepared, prepared], held(false), Step::ContinueVm),
            ([prepared, offered], held(false), Step::Wait),
            ([prepared, offered], held(true), Step::CancelVm(Why::NotPrepared)),
            ([prepared, Back], held(false), Step::CancelVm(Why::Disk)),
            ([Away, prepared], run, Step::Wait),
            ([Away, prepared], Vm::Completed, Step::Wait),
            ([Away, Agreed], Vm::Completed, Step::Wait),
            ([Away, Agreed], Vm::Resumed, Step::End(Some(Why::VmResumed))),
            ([Away, prepared], Vm::Stopped, Step::End(Some(Why::VmStopped))),
            ([prepared, prepared], Vm::Stopped, Step::CancelDisks(Why::VmStopped)),
            ([prepared, prepared], Vm::Resumed, Step::CancelDisks(Why::VmResumed)),
            ([prepared, Back], Vm::Completed, Step::CancelDisks(Why::Disk)),
            ([Away, Back], Vm::Completed, Step::Wait),
            ([Done, Back], Vm::Completed, Step::End(Some(Why::Disk))),
            ([Done, Done], Vm::Completed, Step::End(None)),
            ([Agreed, Agreed], Vm::Lost { overdue: false }, Step::CancelDisks(Why::VmLost)),
            ([Agreed, offered], Vm::Lost { overdue: false }, Step::Wait),
            ([prepared, offered], Vm::Lost { overdue: true }, Step::End(Some(Why::VmLostInSwitchover))),
            ([Away, Done], Vm::Lost { overdue: true }, Step::Wait),
            ([Agreed, Back], Vm::Absent, Step::CancelDisks(Why::Disk)),
            ([Away, Back], Vm::Absent, Step::Wait),
        ];
        for (ats, vm, step) in rows {
            let disks = ats.map(|at| Disk { at, lost: false, cancel: Cancel::Possible });
            assert_eq!(decide(&disks, vm), step, "{ats:?} {vm:?}");
        }
    }
}
