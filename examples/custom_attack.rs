//! An attack and a loss of one's own, in the trainer, on a model of a few thousand weights.
//!
//! ```sh
//! cargo run --release --example custom_attack
//! ```

use std::sync::atomic::AtomicBool;

use advtrain::{
    AdversarialTrainer, AttackSettings, Continuation, ContinuationKind, Decoder, EmbeddingAttack, Example, LoraConfig,
    LossInput, Observer, Perturbation, Probe, Result, RobustLoss, Term, TermValues, ThreatModel, TokenKind, Tokens,
    TrainSettings, TrainingData, UpdateMetrics,
    tch::{Device, Kind},
};
use serde_json::json;

/// Frank-Wolfe: each step goes part of the way to the point of the ball that the gradient likes best.
struct FrankWolfe {
    threat: ThreatModel,
    steps: usize,
}

impl EmbeddingAttack for FrankWolfe {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut current = probe.start()?;
        for step in 0..self.steps {
            let gradient = probe.gradient(&current)?.gradient;
            let (radius, share) = (probe.radius(), 2.0 / (step as f64 + 2.0));
            current = current.zip(&gradient, |d, gradient| {
                let length = gradient.f_norm_scalaropt_dim(2, [1], true)?.f_clamp_min(1e-12)?;
                let vertex = gradient.f_div(&length)?.f_mul_scalar(-radius)?;
                Ok(d.f_lerp(&vertex, share)?)
            })?;
        }
        Ok(vec![current])
    }
}

/// Keeps what the model predicts on a perturbed prompt near what the original predicts on the prompt itself.
struct Smoothness {
    weight: f64,
}

impl RobustLoss for Smoothness {
    fn uses_reference(&self) -> bool {
        true
    }

    fn terms(&self, input: &LossInput) -> Result<Vec<Term>> {
        let targets = input.batch.targets(ContinuationKind::Harmful)?;
        let attacked = input.hidden(&[])?.last.f_index_select(0, &targets.predictors)?;
        let original = input.reference_hidden(&[])?.last.f_index_select(0, &targets.predictors)?;
        let values = targets.mean_per_row(&input.model.kl(&attacked, &original)?)?;
        let values = TermValues::Rows { values, kind: ContinuationKind::Harmful, tokens: Some(targets.counts) };
        Ok(vec![Term { name: "smoothness".into(), weight: self.weight, values, cut_off: None }])
    }
}

struct Print;

impl Observer for Print {
    fn update(&mut self, metrics: &UpdateMetrics) -> Result<()> {
        let attack = metrics.attack.clone().unwrap_or_default();
        println!(
            "update {:2}: KL to the original under attack {:.4}, attack objective {:.3} -> {:.3}",
            metrics.update, metrics.terms["smoothness"], attack.objective_first, attack.objective_last
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    let config = json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "tie_word_embeddings": true
    });
    let mut model = Decoder::random(config, 0.3, 0, Kind::Float, Device::Cpu)?;
    model.add_lora(&LoraConfig { rank: 8, dropout: 0.0, ..LoraConfig::default() }, 0)?;

    let rows = (0..16).map(|row| {
        let ids = |from: i64, len: i64| (0..len).map(|at| (from + row * 7 + at * 3) % 64).collect();
        let answer = Tokens::of_kind(ids(5, 4), TokenKind::Target);
        let harmful = Continuation { kind: ContinuationKind::Harmful, tokens: answer };
        Example::new(format!("row/{row}"), Tokens::of_kind(ids(0, 6), TokenKind::User), vec![harmful])
    });
    let mut trainer = AdversarialTrainer::builder(model)
        .attack(FrankWolfe { threat: ThreatModel::default(), steps: 5 }, AttackSettings::default())
        .robust(Smoothness { weight: 1.0 })
        .data(TrainingData { robust: rows.collect::<Result<_>>()?, utility: Vec::new() })
        .settings(TrainSettings { epochs: 10, batch_size: 16, ..TrainSettings::default() })
        .build()?;
    trainer.observe(Print);
    trainer.run(&AtomicBool::new(false))?;
    Ok(())
}
