//! What is derived from a SHA-256: random numbers that depend on names alone, so that they are the same in every run whatever
//! came before, and texts for cache keys.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// The generator of one named thing: a seed, what it is for, and a name.
pub(crate) fn generator(seed: u64, purpose: &str, name: impl AsRef<[u8]>) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(digest(seed, purpose, name.as_ref()))
}

/// A number in [0, 1) that belongs to a name.
pub(crate) fn share_of(seed: u64, purpose: &str, name: &str) -> f64 {
    let digest = digest(seed, purpose, name.as_bytes());
    let leading = digest[..8].iter().fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
    // 53 bits, which a float holds exactly.
    (leading >> 11) as f64 / (1_u64 << 53) as f64
}

/// A short text that differs between contents.
pub(crate) fn bytes_digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))[..16].to_string()
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest(seed: u64, purpose: &str, name: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(seed.to_le_bytes());
    // Its length keeps the purpose apart from what follows.
    hasher.update((purpose.len() as u64).to_le_bytes());
    hasher.update(purpose.as_bytes());
    hasher.update(name);
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
}
