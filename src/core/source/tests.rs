// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traps of the source, one test each.
