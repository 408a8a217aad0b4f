// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The companion thread: the one owner of the volume's role (layer L5).

pub mod status;
