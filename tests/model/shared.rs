// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Parts of a state that neighbouring states share, with a fingerprint that is computed once for each change.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// A folding multiply for each word: quick, and good enough for fingerprints of 64 bits.
#[derive(Debug)]
pub(crate) struct Mixer(u64);

impl Mixer {
    pub(crate) fn print(value: &impl Hash) -> u64 {
        let mut mixer = Self(0x243f_6a88_85a3_08d3);
        value.hash(&mut mixer);
        mixer.finish()
    }

    fn fold(&mut self, word: u64) {
        let wide = u128::from(self.0 ^ word) * u128::from(0x9e37_79b9_7f4a_7c15_u64 | 1 << 63);
        self.0 = (wide as u64) ^ ((wide >> 64) as u64) ^ self.0.rotate_left(29);
    }
}

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        let mut last = Self(self.0 ^ 0x1319_8a2e_0370_7344);
        last.fold(self.0);
        last.fold(0xa409_3822_299f_31d0);
        last.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.fold(u64::from_le_bytes(word) ^ (part.len() as u64) << 59);
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.fold(u64::from(word) | 1 << 32);
    }

    fn write_u32(&mut self, word: u32) {
        self.fold(u64::from(word) | 1 << 33);
    }

    fn write_u64(&mut self, word: u64) {
        self.fold(word);
    }

    fn write_usize(&mut self, word: usize) {
        self.fold(word as u64 ^ 1 << 62);
    }
}

/// See the module's header. After `edit` the fingerprint is stale until `seal`.
#[derive(Debug, Clone)]
pub(crate) struct Shared<T> {
    value: Arc<T>,
    print: u64,
}

impl<T: Hash + Clone> Shared<T> {
    pub(crate) fn new(value: T) -> Self {
        let print = Mixer::print(&value).max(1);
        Self { value: Arc::new(value), print }
    }

    pub(crate) fn get(&self) -> &T {
        &self.value
    }

    pub(crate) fn edit(&mut self) -> &mut T {
        self.print = 0;
        Arc::make_mut(&mut self.value)
    }

    /// Whether it was changed since it was sealed.
    pub(crate) fn edited(&self) -> bool {
        self.print == 0
    }

    pub(crate) fn seal(&mut self) {
        if self.print == 0 {
            self.print = Mixer::print(&*self.value).max(1);
        }
    }
}

impl<T: PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print && self.value == other.value
    }
}

impl<T: Eq> Eq for Shared<T> {}

impl<T> Hash for Shared<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        debug_assert!(self.print != 0, "a state was not sealed");
        state.write_u64(self.print);
    }
}
