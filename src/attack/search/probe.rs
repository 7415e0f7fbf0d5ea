//! Candidates judged by a cheaper model first: probe sampling of Zhao et al. 2024, "Accelerating Greedy Coordinate Gradient and
//! General Prompt Optimization via Probe Sampling".

use rand::{Rng, seq::index::sample};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A cheaper judge of candidates.
pub trait Draft {
    /// A loss for each candidate's ids, which are those of the attacked model's tokens.
    ///
    /// # Errors
    /// Whatever the implementation meets.
    fn losses(&mut self, candidates: &[Vec<i64>]) -> Result<Vec<f64>>;
}

/// How far a draft model is trusted.
///
/// Of `width` candidates that can be read back a random sample of `width / sampled` is judged by both models. The better their ranks agree, with alpha =
/// (1 + Spearman's correlation) / 2, the fewer of the candidates that the draft holds best, (1 - alpha) width / `reduction` of them, are judged
/// by the attacked model too.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `sampled` | 16 | one of so many is judged by both | at least 1 |
/// | `reduction` | 8 | one of so many is judged where the ranks are each other's reverse | at least 1 |
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProbeSampling {
    /// One of so many candidates is judged by both models.
    pub sampled: usize,
    /// One of so many candidates is judged by the attacked model where the ranks are each other's reverse.
    pub reduction: usize,
}

impl Default for ProbeSampling {
    fn default() -> Self {
        Self { sampled: 16, reduction: 8 }
    }
}

impl ProbeSampling {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        Error::check_count("probe_sampling.sampled", self.sampled)?;
        Error::check_count("probe_sampling.reduction", self.reduction)
    }

    /// The candidates that the attacked model judges, and their losses from `target`. `draft` is a loss for each candidate.
    pub(super) fn losses(
        &self,
        draft: &[f64],
        random: &mut impl Rng,
        target: &mut dyn FnMut(&[usize]) -> Result<Vec<f64>>,
    ) -> Result<Vec<(usize, f64)>> {
        let width = draft.len();
        let amount = (width / self.sampled).max(1);
        let probes = sample(random, width, amount).into_vec();
        let found = target(&probes)?;
        let alpha = agreement(&probes.iter().map(|at| draft[*at]).collect::<Vec<_>>(), &found);
        let filtered = (((1.0 - alpha) * width as f64 / self.reduction as f64) as usize).clamp(1, width);
        let mut best: Vec<usize> = (0..width).collect();
        best.sort_by(|a, b| draft[*a].total_cmp(&draft[*b]));
        best.truncate(filtered);
        best.retain(|at| !probes.contains(at));
        let rest = if best.is_empty() { Vec::new() } else { target(&best)? };
        Ok(probes.into_iter().zip(found).chain(best.into_iter().zip(rest)).collect())
    }
}

/// (1 + Spearman's rank correlation) / 2, from 0 to 1; a half where there is nothing to rank.
fn agreement(left: &[f64], right: &[f64]) -> f64 {
    let (left, right) = (ranks(left), ranks(right));
    let middle = (left.len() as f64 - 1.0) / 2.0;
    let of = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle)).sum::<f64>();
    let scale = (of(&left, &left) * of(&right, &right)).sqrt();
    if scale > 0.0 { (1.0 + of(&left, &right) / scale) / 2.0 } else { 0.5 }
}

/// The rank of each number, from 0; equal numbers share the mean of theirs.
fn ranks(numbers: &[f64]) -> Vec<f64> {
    let count = |of: &dyn Fn(&f64) -> bool| numbers.iter().filter(|number| of(number)).count() as f64;
    let rank = |own: &f64| count(&|other| other < own) + (count(&|other| other == own) - 1.0) / 2.0;
    numbers.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// 1 - 6 sum d^2 / (n (n^2 - 1)) = 0.7 where the ranks differ by 1, 0, 2, 0 and 1.
    #[test]
    fn agreement_is_spearmans() {
        assert_relative_eq!(agreement(&[3.0, 1.0, 2.0, 5.0, 4.0], &[2.0, 1.0, 4.0, 5.0, 3.0]), 0.85);
        assert_relative_eq!(agreement(&[1.0, 2.0], &[2.0, 1.0]), 0.0);
        assert_relative_eq!(agreement(&[1.0], &[1.0]), 0.5);
        // scipy.stats.spearmanr([1, 2, 2, 4], [1, 3, 2, 4]) is 0.9486832980505138.
        assert_relative_eq!(agreement(&[1.0, 2.0, 2.0, 4.0], &[1.0, 3.0, 2.0, 4.0]), 1.948_683_298_050_513_8 / 2.0);
    }

    /// A draft that is right: of 64 candidates four probes and the one best are judged.
    #[test]
    fn a_draft_that_agrees_spares_passes() {
        let draft: Vec<f64> = (0..64).map(|at| ((at * 37) % 64) as f64).collect();
        let best = (0..64).find(|at| draft[*at] == 0.0).unwrap();
        let mut judged = 0;
        let mut target = |chosen: &[usize]| {
            judged += chosen.len();
            Ok(chosen.iter().map(|at| 10.0 + draft[*at]).collect())
        };
        let random = &mut ChaCha8Rng::seed_from_u64(0);
        let found = ProbeSampling::default().losses(&draft, random, &mut target).unwrap();
        assert!(found.contains(&(best, 10.0)));
        assert!(judged <= 5, "{judged}");
    }
}
