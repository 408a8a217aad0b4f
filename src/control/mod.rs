// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control plane (layer L6): the API on a UNIX socket, metrics, the client, QMP.
//!
//! Everything that is said here passes through [`crate::node::status`]: the API turns HTTP into a
//! [`Command`](crate::node::status::Command) and a [`Snapshot`](crate::node::status::Snapshot) into JSON. It decides
//! nothing about ownership; what is admissible is the node's to say. The node does not know this layer: the binary
//! starts [`api::serve`] with the [`NodeHandle`](crate::node::status::NodeHandle) that the node gives out.
//!
//! Server: [`socket`] (a place to listen), [`api`] (routes), [`events`] (server-sent events), [`metrics`], [`openapi`].
//! Client: [`client`] (typed calls), [`qmp`] (QEMU), [`follow`] (the migration of a VM's disks from its request to its end), [`cli`].
//! [`daemon_args`] is the command line of `blkferryd`.

pub mod api;
pub mod cli;
pub mod client;
pub mod daemon_args;
pub mod events;
pub mod follow;
pub mod metrics;
pub mod openapi;
pub mod qmp;
pub mod size;
pub mod socket;
pub mod words;
