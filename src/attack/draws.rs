//! Random numbers that do not depend on a row's place in a batch.

use rand_chacha::ChaCha8Rng;

use crate::digest::generator;

/// Where an attack's random numbers come from: a row's depend on the seed, the epoch, the row's example id and the restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    /// The run's seed.
    pub seed: u64,
    /// How often the row's set was gone through, so that a row meets other numbers every time.
    pub epoch: u64,
}

impl Draws {
    /// The generator of one row and restart.
    pub fn generator(&self, example_id: &str, restart: usize) -> ChaCha8Rng {
        generator(self.seed, "attack", format!("{}\0{restart}\0{example_id}", self.epoch))
    }
}
