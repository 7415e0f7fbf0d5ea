//! Random numbers that depend on names alone, so that they are the same in every run, whatever came before.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use sha2::{Digest, Sha256};

/// A generator for one purpose: a seed, what it is for, and a counter.
pub(super) fn generator(seed: u64, purpose: &str, counter: u64) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(digest(seed, purpose, &counter.to_le_bytes()))
}

/// A number in [0, 1) that belongs to a text.
pub(super) fn share_of(seed: u64, purpose: &str, text: &str) -> f64 {
    let digest = digest(seed, purpose, text.as_bytes());
    let leading = digest[..8].iter().fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
    // 53 bits, which a float holds exactly.
    (leading >> 11) as f64 / (1_u64 << 53) as f64
}

/// Shuffles in place. Written out, because a library's own way may change from version to version and a run must resume.
pub(super) fn shuffle<T>(items: &mut [T], generator: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        let wide = u128::from(generator.next_u64()) * (last as u128 + 1);
        items.swap(last, (wide >> 64) as usize);
    }
}

fn digest(seed: u64, purpose: &str, what: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(seed.to_le_bytes());
    // Its length keeps the purpose apart from what follows.
    hasher.update((purpose.len() as u64).to_le_bytes());
    hasher.update(purpose.as_bytes());
    hasher.update(what);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed with Python's hashlib from the same bytes.
    #[test]
    fn shares_come_from_the_digest() {
        assert_eq!(share_of(7, "held-out", "a/1"), 0.8182869108170323);
    }

    #[test]
    fn a_shuffle_keeps_all_items_and_depends_on_its_names() {
        let order = |seed, purpose, counter| {
            let mut items: Vec<usize> = (0..50).collect();
            shuffle(&mut items, &mut generator(seed, purpose, counter));
            items
        };
        let first = order(1, "a", 0);
        assert_eq!(first, order(1, "a", 0));
        for other in [order(2, "a", 0), order(1, "b", 0), order(1, "a", 1)] {
            assert_ne!(first, other);
            let mut sorted = other;
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_place_is_equally_likely() {
        let mut counts = [[0; 3]; 3];
        for counter in 0..6_000 {
            let mut items = [0, 1, 2];
            shuffle(&mut items, &mut generator(0, "x", counter));
            items.iter().enumerate().for_each(|(place, item)| counts[*item][place] += 1);
        }
        // 2000 expected, standard deviation 37.
        assert!(counts.iter().flatten().all(|count| (1_850..2_150).contains(count)), "{counts:?}");
    }
}
