// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Numbered places that are used again. A key names one stay: a wake-up that comes late, for a piece that is gone,
//! finds nothing instead of the piece that has its place now.

/// Keys stay below this bit, which is free for the user.
pub(super) const FLAG: u64 = 1 << 63;

#[derive(Debug)]
struct Place<T> {
    generation: u32,
    value: Option<T>,
}

/// The places.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }

    pub(super) fn insert(&mut self, value: T) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, value: None });
            // Bounded by the rings: far below 2^32.
            u32::try_from(self.places.len() - 1).unwrap_or(u32::MAX)
        });
        let place = &mut self.places[at as usize];
        place.value = Some(value);
        u64::from(place.generation) << 32 | u64::from(at)
    }

    fn at(key: u64) -> (usize, u32) {
        let generation = u32::try_from((key & !FLAG) >> 32).unwrap_or(0);
        let at = u32::try_from(key & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        (at as usize, generation)
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (at, generation) = Self::at(key);
        self.places.get_mut(at).filter(|place| place.generation == generation)?.value.as_mut()
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let (at, generation) = Self::at(key);
        let place = self.places.get_mut(at).filter(|place| place.generation == generation)?;
        let value = place.value.take()?;
        place.generation = place.generation.wrapping_add(1) & (u32::MAX >> 1);
        self.free.push(u32::try_from(at).unwrap_or(u32::MAX));
        Some(value)
    }

    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(super) fn keys_where(&self, wanted: impl Fn(&T) -> bool) -> Vec<u64> {
        let live = self.places.iter().enumerate();
        live.filter(|(_, place)| place.value.as_ref().is_some_and(&wanted))
            .map(|(at, place)| u64::from(place.generation) << 32 | at as u64)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_late_key_finds_nothing() {
        let mut slab = Slab::new();
        let first = slab.insert('a');
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert('b');
        assert_ne!(first, second);
        assert!(slab.get_mut(first).is_none());
        assert!(slab.remove(first).is_none());
        assert_eq!(slab.keys_where(|value| *value == 'b'), [second]);
        assert_eq!(*slab.get_mut(second).unwrap(), 'b');
        assert_eq!(slab.len(), 1);
    }
}
