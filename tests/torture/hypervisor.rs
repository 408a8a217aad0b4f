// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the hypervisor says to a daemon that may die while it speaks: the front-end's messages, with their errors.

use crate::guest::{Ask, Guest, Memory, Queue};
use crate::world::World;
use std::os::fd::AsRawFd;
use std::time::Duration;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{Result, VhostBackend};

/// Time in which a daemon would have processed a request that it must not process.
const PATIENCE: Duration = Duration::from_millis(30);

/// A STOP; returns the base of the only ring.
pub fn stop(guest: &mut Guest) -> Result<u32> {
    guest.enable(false)?;
    guest.link.get_vring_base(0)
}

/// A START of the only ring, on rings that came from elsewhere.
pub fn start(guest: &mut Guest, base: u32) -> Result<()> {
    guest.link.set_features(guest.features)?;
    let queue = &guest.queues[0];
    guest.link.set_vring_call(0, &queue.call)?;
    guest.link.set_vring_err(0, &queue.error)?;
    if guest.inflight.is_none() {
        let wanted = VhostUserInflight::new(0, 0, 1, queue.ring);
        guest.inflight = Some(guest.link.get_inflight_fd(&wanted)?);
    }
    if let Some((region, file)) = &guest.inflight {
        guest.link.set_inflight_fd(region, file.as_raw_fd())?;
    }
    guest.link.set_mem_table(&guest.memory.regions())?;
    let queue = &guest.queues[0];
    guest.link.set_vring_num(0, queue.ring)?;
    guest.link.set_vring_base(0, base as u16)?;
    guest.link.set_vring_addr(0, &guest.ring_config(0, false))?;
    queue.kick.write(1).unwrap();
    guest.link.set_vring_kick(0, &queue.kick)?;
    guest.enable(true)
}

/// A second guest is started at a side, on memory of its own, and wants to write; whether anything was processed.
pub fn is_served_as_well(world: &World, side: usize) -> bool {
    let mut guest = Guest::connect_with(&world.sides[side].socket(), 1, Memory::new());
    guest.queues = vec![Queue::new(0)];
    guest.set_up(&[0]);
    guest.send(0, &Ask::Out(0, &[7; 4096]));
    // A refusal is one right answer, to process nothing the other.
    let _ = guest.enable(true);
    guest.kick(0);
    std::thread::sleep(PATIENCE);
    !guest.reap(0).is_empty()
}
