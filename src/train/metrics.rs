//! What an update reports.

use std::collections::BTreeMap;

use ndarray::Array2;
use serde::{Deserialize, Deserializer, Serialize};

use crate::AttackStatistics;

/// The numbers of one update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UpdateMetrics {
    /// The update, from 1.
    pub update: usize,
    /// Updates in the whole run.
    pub updates_total: usize,
    /// The epoch that the update belongs to, from 0.
    pub epoch: u64,
    /// The learning rate of this update.
    #[serde(deserialize_with = "number")]
    pub learning_rate: f64,
    /// L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "number")]
    pub gradient_norm: f64,
    /// The weighed sum of all terms.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// For each term its mean over rows, before weight and cut-off.
    #[serde(deserialize_with = "numbers")]
    pub terms: BTreeMap<String, f64>,
    /// What the attack did, if there was one.
    pub attack: Option<AttackMetrics>,
    /// Rows.
    pub rows: usize,
    /// Tokens of prompts and continuations.
    pub tokens: usize,
    /// Those that a pass of the utility loss reads.
    #[serde(default)]
    pub utility_tokens: usize,
    /// Micro-batches.
    pub micro_batches: usize,
    /// Wall-clock seconds.
    #[serde(deserialize_with = "number")]
    pub seconds: f64,
}

/// What the attack of one update did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AttackMetrics {
    /// Rows attacked.
    pub rows: usize,
    /// Perturbed tokens, times sites and perturbations that the attack returned.
    pub tokens: usize,
    /// Mean objective of a row at the first candidate.
    #[serde(deserialize_with = "number")]
    pub objective_first: f64,
    /// Mean objective of a row at the last candidate tried, or at the best where the best is kept.
    #[serde(deserialize_with = "number")]
    pub objective_last: f64,
    /// Share of the perturbed tokens whose size is at least 0.999 of the radius: at the edge, or beyond it where there is no
    /// ball.
    #[serde(deserialize_with = "number")]
    pub edge_share: f64,
    /// Mean size of a perturbed token as a share of the radius: its L2 norm, under [`Norm::Linf`](crate::Norm::Linf) its largest
    /// number, under [`Norm::RowL2`](crate::Norm::RowL2) its row's norm.
    #[serde(deserialize_with = "number")]
    pub mean_size: f64,
    /// Epsilon in the units of what is perturbed.
    #[serde(deserialize_with = "number")]
    pub radius: f64,
    /// Forward passes over micro-batches.
    pub forward_passes: u64,
    /// Backward passes over micro-batches.
    pub backward_passes: u64,
    /// Tokens of prompts and continuations that the forward passes read, in all.
    #[serde(default)]
    pub pass_tokens: u64,
}

/// JSON has no number that is not finite: serde_json writes null, which is read back as NaN.
fn number<'de, D: Deserializer<'de>>(json: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(json)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(json: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let numbers = BTreeMap::<String, Option<f64>>::deserialize(json)?;
    Ok(numbers.into_iter().map(|(name, number)| (name, number.unwrap_or(f64::NAN))).collect())
}

impl From<&AttackStatistics> for AttackMetrics {
    fn from(sums: &AttackStatistics) -> Self {
        let rows = sums.rows.max(1) as f64;
        let tokens = sums.tokens.max(1) as f64;
        Self {
            rows: sums.rows,
            tokens: sums.tokens,
            objective_first: sums.objective_first / rows,
            objective_last: sums.objective_last / rows,
            edge_share: sums.tokens_at_edge as f64 / tokens,
            mean_size: sums.relative_size / tokens,
            radius: sums.radius,
            forward_passes: sums.forward_passes,
            backward_passes: sums.backward_passes,
            pass_tokens: sums.pass_tokens,
        }
    }
}

impl UpdateMetrics {
    /// Every number worth a curve, with its name.
    pub fn scalars(&self) -> Vec<(String, f64)> {
        let mut scalars = vec![
            ("train/loss".to_string(), self.loss),
            ("train/learning_rate".to_string(), self.learning_rate),
            ("train/gradient_norm".to_string(), self.gradient_norm),
            ("train/epoch".to_string(), self.epoch as f64),
            ("train/seconds".to_string(), self.seconds),
        ];
        scalars.extend(self.terms.iter().map(|(name, value)| (format!("term/{name}"), *value)));
        if let Some(attack) = &self.attack {
            for (name, value) in [
                ("objective_first", attack.objective_first),
                ("objective_last", attack.objective_last),
                ("edge_share", attack.edge_share),
                ("mean_size", attack.mean_size),
            ] {
                scalars.push((format!("attack/{name}"), value));
            }
        }
        scalars
    }
}

/// The scalars of many updates as an array `[updates, names]`, for analysis; NaN where an update lacks a scalar.
pub fn metrics_array(updates: &[UpdateMetrics]) -> (Vec<String>, Array2<f64>) {
    let rows: Vec<BTreeMap<String, f64>> =
        updates.iter().map(|update| update.scalars().into_iter().collect()).collect();
    let mut names: Vec<String> = rows.iter().flat_map(|row| row.keys().cloned()).collect();
    names.sort_unstable();
    names.dedup();
    let array = Array2::from_shape_fn((rows.len(), names.len()), |(row, column)| {
        rows[row].get(&names[column]).copied().unwrap_or(f64::NAN)
    });
    (names, array)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_term(name: &str, value: f64) -> UpdateMetrics {
        UpdateMetrics { terms: BTreeMap::from([(name.to_string(), value)]), ..Default::default() }
    }

    #[test]
    fn a_number_that_is_not_finite_survives_a_file() {
        let metrics = UpdateMetrics {
            loss: f64::NAN,
            attack: Some(AttackMetrics { objective_first: f64::INFINITY, ..Default::default() }),
            ..with_term("away", f64::NAN)
        };
        let read: UpdateMetrics = serde_json::from_str(&serde_json::to_string(&metrics).unwrap()).unwrap();
        assert!(read.loss.is_nan() && read.terms["away"].is_nan() && read.attack.unwrap().objective_first.is_nan());
        let missing = r#"{"update":1}"#;
        assert!(serde_json::from_str::<UpdateMetrics>(missing).is_err());
    }

    #[test]
    fn an_absent_scalar_is_nan_in_the_array() {
        let (names, array) = metrics_array(&[with_term("away", -1.0), with_term("toward", 2.0)]);
        let column = |name: &str| names.iter().position(|own| own == name).unwrap();
        assert_eq!(array[[0, column("term/away")]], -1.0);
        assert_eq!(array[[1, column("term/toward")]], 2.0);
        assert!(array[[0, column("term/toward")]].is_nan() && array[[1, column("term/away")]].is_nan());
    }
}
