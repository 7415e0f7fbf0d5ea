//! Random numbers that do not depend on a row's place in a batch.

use rand_chacha::ChaCha8Rng;

use crate::digest::generator;

/// What an attack's random numbers are drawn from. With the example id of a row and the number of a restart it gives
/// that row's generator, whatever batch the row is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    /// The run's seed.
    pub seed: u64,
    /// How often the row's set was gone through when the update began, so that a row meets other numbers in every pass.
    /// (An update can begin in one pass over its rows and end in the next, or hold several passes over a small set; all of it
    /// is counted to the first.)
    pub epoch: u64,
}

impl Draws {
    /// The generator of one row and restart, anew at each call: [`super::Probe::random`] begins with this one, so
    /// another use ([`super::EmbeddingAttack::reseed`], say) wants an id that no example has.
    pub fn generator(&self, example_id: &str, restart: usize) -> ChaCha8Rng {
        generator(self.seed, "attack", format!("{}\0{restart}\0{example_id}", self.epoch))
    }
}
