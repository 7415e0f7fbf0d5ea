//! Shared by the tests of attacks: a threat set, one run, and what came of it.
#![allow(dead_code, reason = "each test crate uses a part")]

use advtrain::{
    AttackOutcome, AttackSettings, Batch, CausalLm, ContinuationKind, EmbeddingAttack, Perturbation, Pgd, Radius,
    StepRule, StepSize, TargetCrossEntropy, ThreatModel, tch::Tensor,
};

use crate::toy::{attacked, cross_entropy, numbers};

pub const RADIUS: f64 = 0.6;

pub fn threat() -> ThreatModel {
    ThreatModel { radius: Radius::Absolute(RADIUS), ..ThreatModel::default() }
}

pub fn run(
    attack: &mut dyn EmbeddingAttack,
    settings: &AttackSettings,
    model: &dyn CausalLm,
    rows: &Batch,
) -> AttackOutcome {
    attacked(attack, &mut TargetCrossEntropy, settings.clone(), model, rows).unwrap()
}

pub fn values(perturbation: &Perturbation) -> &Tensor {
    &perturbation.parts()[0].1
}

/// The norm of each token's vector.
pub fn sizes(perturbation: &Perturbation) -> Vec<f64> {
    numbers(&values(perturbation).norm_scalaropt_dim(2, [1], false))
}

/// The values of one row.
pub fn row(perturbation: &Perturbation, row: usize) -> Vec<f64> {
    numbers(values(&perturbation.restrict(&[row]).unwrap()))
}

pub fn norm(vector: &[f64]) -> f64 {
    vector.iter().map(|one| one * one).sum::<f64>().sqrt()
}

pub fn harmful_loss(model: &dyn CausalLm, rows: &Batch, perturbation: &Perturbation) -> Vec<f64> {
    numbers(&cross_entropy(model, rows, ContinuationKind::Harmful, Some(perturbation)))
}

pub fn assert_near(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-12, "{what}: {found} instead of {expected}");
    }
}

pub fn steps(size: StepSize) -> Pgd {
    Pgd { threat: threat(), steps: 5, rule: StepRule::L2, momentum: None, size }
}

/// The first losses are nowhere above the second, and somewhere below.
pub fn assert_never_worse(better: &[f64], worse: &[f64]) {
    assert!(better.iter().zip(worse).all(|(better, worse)| *better <= worse + 1e-12), "{better:?}, {worse:?}");
    assert!(better.iter().zip(worse).any(|(better, worse)| *better < worse - 1e-6), "{better:?}, {worse:?}");
}
