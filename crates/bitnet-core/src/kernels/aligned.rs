//! Memory that starts a cache line, so that none of the vectors it is read and written in crosses one.

use std::ops::{Deref, DerefMut};

const CACHE_LINE: usize = 64;

/// Values that are zero, and their pages untouched, until they are written.
#[derive(Debug, Default)]
pub struct AlignedVec<T> {
    memory: Vec<T>,
    /// Of the first that counts.
    start: usize,
    len: usize,
}

impl<T: Copy + Default> AlignedVec<T> {
    /// `len` of them.
    pub fn new(len: usize) -> Self {
        let memory = vec![T::default(); len + CACHE_LINE / size_of::<T>()];
        let start = memory.as_ptr().align_offset(CACHE_LINE).min(memory.len() - len);
        Self { memory, start, len }
    }

    /// The first `len`. What was there before is lost when there were fewer.
    pub(super) fn at_least(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            *self = Self::new(len);
        }
        &mut self[..len]
    }
}

impl<T> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..][..self.len]
    }
}

impl<T> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_start_a_cache_line_and_are_kept_while_there_are_enough() {
        for len in [0, 1, 7, 64, 1000] {
            let values = AlignedVec::<f32>::new(len);
            assert!(values.iter().all(|&value| value == 0.0) && values.len() == len);
            assert!(values.as_ptr().addr().is_multiple_of(CACHE_LINE), "{len}");
        }
        let mut bytes = AlignedVec::<u8>::default();
        bytes.at_least(100).fill(1);
        assert_eq!(bytes.at_least(50), [1; 50]);
        assert_eq!(bytes.at_least(100), [1; 100]);
        assert!(bytes.at_least(101).as_ptr().addr().is_multiple_of(CACHE_LINE));
    }
}
