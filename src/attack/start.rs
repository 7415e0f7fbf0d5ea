//! Where an attack starts.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

use super::threat::Norm;
use crate::Place;

/// Where an attack starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// No perturbation (the paper's).
    #[default]
    Zero,
    /// Uniform in the ball, whatever its norm.
    Uniform,
    /// Gaussian, then projected. The standard deviation of each number is radius / sqrt(n), n being how many numbers
    /// the norm is taken of (a token's, or with [`Norm::RowL2`] a row's); with [`Norm::Linf`] it is the radius.
    Gaussian,
}

impl Start {
    /// The start of one site, `places * hidden` numbers. `places` come row by row, and each row has its generator.
    pub(super) fn draw(
        self,
        norm: Norm,
        radius: f64,
        places: &[Place],
        hidden: usize,
        random: &mut [ChaCha8Rng],
    ) -> Vec<f64> {
        let mut start = Vec::with_capacity(places.len() * hidden);
        // What the norm is taken of together.
        for group in places.chunk_by(|one, next| norm == Norm::RowL2 && one.row == next.row) {
            let (numbers, random) = (group.len() * hidden, &mut random[group[0].row]);
            match (self, norm) {
                (Self::Zero, _) => start.extend(std::iter::repeat_n(0.0, numbers)),
                (Self::Uniform, Norm::Linf) => {
                    start.extend((0..numbers).map(|_| radius * (2.0 * random.random::<f64>() - 1.0)));
                }
                (Self::Uniform, Norm::L2 | Norm::RowL2) => start.extend(uniform_in_ball(numbers, radius, random)),
                (Self::Gaussian, _) => {
                    let deviation = if norm == Norm::Linf { radius } else { radius / (numbers as f64).sqrt() };
                    start.extend(gaussian(numbers, random).into_iter().map(|number| deviation * number));
                }
            }
        }
        start
    }
}

/// A Gaussian's direction, with the n-th root of a uniform number as its length.
fn uniform_in_ball(numbers: usize, radius: f64, random: &mut ChaCha8Rng) -> impl Iterator<Item = f64> {
    let direction = gaussian(numbers, random);
    let size = direction.iter().map(|number| number * number).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    let length = radius * random.random::<f64>().powf(1.0 / numbers as f64);
    direction.into_iter().map(move |number| number / size * length)
}

fn gaussian(numbers: usize, random: &mut ChaCha8Rng) -> Vec<f64> {
    StandardNormal.sample_iter(random).take(numbers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::generator;

    const HIDDEN: usize = 3;
    const RADIUS: f64 = 2.0;
    const ROWS: usize = 4000;

    /// Rows of two tokens: the numbers of each row.
    fn rows(start: Start, norm: Norm) -> Vec<Vec<f64>> {
        let places: Vec<Place> = (0..2 * ROWS).map(|at| Place { row: at / 2, offset: at % 2 }).collect();
        let mut random: Vec<_> = (0..ROWS).map(|row| generator(0, "test", row.to_le_bytes())).collect();
        let numbers = start.draw(norm, RADIUS, &places, HIDDEN, &mut random);
        numbers.chunks(2 * HIDDEN).map(<[f64]>::to_vec).collect()
    }

    fn size(vector: &[f64]) -> f64 {
        vector.iter().map(|number| number * number).sum::<f64>().sqrt()
    }

    /// The share of the ball within s of its centre is s^n: that share of each size is uniform, with mean 1/2 and
    /// deviation sqrt(1/12).
    fn assert_uniform(shares: &[f64]) {
        let count = shares.len() as f64;
        let mean = shares.iter().sum::<f64>() / count;
        assert!((mean - 0.5).abs() < 4.0 * (1.0 / 12.0f64).sqrt() / count.sqrt(), "{mean}");
        assert!(shares.iter().all(|share| (0.0..=1.0 + 1e-12).contains(share)));
        let below = shares.iter().filter(|share| **share < 0.25).count() as f64 / count;
        assert!((below - 0.25).abs() < 4.0 * (0.25f64 * 0.75 / count).sqrt(), "{below}");
    }

    #[test]
    fn a_uniform_start_fills_the_ball_of_every_norm() {
        let tokens = |row: Vec<f64>| row.chunks(HIDDEN).map(|token| (size(token) / RADIUS).powi(3)).collect::<Vec<_>>();
        assert_uniform(&rows(Start::Uniform, Norm::L2).into_iter().flat_map(tokens).collect::<Vec<_>>());
        let whole = rows(Start::Uniform, Norm::RowL2);
        assert_uniform(&whole.iter().map(|row| (size(row) / RADIUS).powi(6)).collect::<Vec<_>>());
        let numbers = rows(Start::Uniform, Norm::Linf).concat();
        assert_uniform(&numbers.iter().map(|number| 0.5 * (number / RADIUS + 1.0)).collect::<Vec<_>>());
    }

    #[test]
    fn a_gaussian_start_has_the_radius_as_root_mean_square_size() {
        let mean = |squares: Vec<f64>| squares.iter().sum::<f64>() / squares.len() as f64;
        let squares = |norm| rows(Start::Gaussian, norm).iter().map(|row| size(row).powi(2)).collect::<Vec<_>>();
        // A sum of n squares of deviation d has mean n d², and deviation d² sqrt(2 n).
        for (norm, expected, deviation) in [
            (Norm::L2, 2.0 * RADIUS * RADIUS, RADIUS * RADIUS / 3.0 * 12f64.sqrt()),
            (Norm::RowL2, RADIUS * RADIUS, RADIUS * RADIUS / 6.0 * 12f64.sqrt()),
            (Norm::Linf, 6.0 * RADIUS * RADIUS, RADIUS * RADIUS * 12f64.sqrt()),
        ] {
            let found = mean(squares(norm));
            assert!((found - expected).abs() < 4.0 * deviation / (ROWS as f64).sqrt(), "{norm:?}: {found}");
        }
    }
}
