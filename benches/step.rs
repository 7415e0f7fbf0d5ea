//! Cost of one attack iteration and of one whole update, on random models of real shapes.
//!
//! ```sh
//! cargo bench --bench step                    # all
//! cargo bench --bench step -- smollm2-135m    # one shape
//! ```
//!
//! Eight harmful rows of 64 prompt and 24 target tokens, safe answers of 8; ragged: prompts from 16 to 64 tokens. The C-AdvUL
//! update has 56 utility rows besides. LoRA of rank 64 on every linear layer, float32.

use std::{hint::black_box, time::Instant};

use advtrain::{
    AdvIpoLoss, AdvUlLoss, AdversarialTrainer, AttackRunner, AttackSettings, Batch, Continuation, ContinuationKind,
    Decoder, Draws, Example, LoraConfig, Pgd, SupervisedLoss, TargetCrossEntropy, TokenKind, Tokens, TrainSettings,
    TrainingData,
    tch::{Device, Kind},
};
use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};
use serde_json::{Value, json};

/// A name, and the config.json of the shape.
type Shape = (&'static str, fn() -> Value);

const SHAPES: [Shape; 2] = [("gemma-small", gemma_small), ("smollm2-135m", smollm2)];
const ROWS: usize = 8;
const UTILITY_ROWS: usize = 56;
const PROMPT: usize = 64;
const TARGET: usize = 24;
const SAFE: usize = 8;
/// Iterations of one attack.
const STEPS: usize = 10;

/// The real vocabulary of 256,000, few thin layers: the head dominates.
fn gemma_small() -> Value {
    json!({
        "model_type": "gemma", "vocab_size": 256_000, "hidden_size": 512, "intermediate_size": 4096,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128
    })
}

fn smollm2() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "tie_word_embeddings": true
    })
}

fn model(config: Value) -> Decoder {
    let mut model = Decoder::random(config, 0.02, 0, Kind::Float, Device::Cpu).expect("the shape is a valid config");
    model.add_lora(&LoraConfig::default(), 0).expect("the default adapter fits every model");
    model
}

fn tokens(seed: usize, len: usize, kind: TokenKind) -> Tokens {
    let id = |at: usize| (5 + (seed * 7919 + at * 104_729) % 40_000) as i64;
    Tokens::of_kind((0..len).map(id).collect(), kind)
}

fn prompt(row: usize, ragged: bool) -> Tokens {
    let len = if ragged { PROMPT / 4 + (PROMPT - PROMPT / 4) * row / (ROWS - 1) } else { PROMPT };
    tokens(row, len, TokenKind::User)
}

fn row(id: String, prompt: Tokens, answers: &[(ContinuationKind, usize)]) -> Example {
    let answer = |(kind, len): &(ContinuationKind, usize)| Continuation {
        kind: *kind,
        tokens: tokens(id.len() + *len, *len, TokenKind::Target),
    };
    let answers = answers.iter().map(answer).collect();
    Example::new(id.clone(), prompt, answers).expect("prompt and answers have tokens")
}

fn harmful_rows(ragged: bool) -> Vec<Example> {
    let answers = [(ContinuationKind::Harmful, TARGET), (ContinuationKind::Safe, SAFE)];
    (0..ROWS).map(|index| row(format!("harmful/{index}"), prompt(index, ragged), &answers)).collect()
}

fn attack(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attack iteration");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for (name, config) in SHAPES {
        let model = model(config());
        for ragged in [false, true] {
            let batch = Batch::new(harmful_rows(ragged), Device::Cpu).expect("rows");
            let mut attack = Pgd { steps: STEPS, ..Pgd::default() };
            let mut runner = AttackRunner::new(AttackSettings::default(), &attack, &model).expect("settings");
            let id = BenchmarkId::new(name, if ragged { "ragged" } else { "equal" });
            group.bench_function(id, |bencher| {
                // A whole attack is run, merging the adapter included, and its time divided.
                bencher.iter_custom(|attacks| {
                    let begin = Instant::now();
                    for _ in 0..attacks {
                        let draws = Draws { seed: 0, epoch: 0 };
                        let outcome = runner.run(&mut attack, &mut TargetCrossEntropy, &model, &batch, draws);
                        black_box(outcome.expect("the attack runs"));
                    }
                    begin.elapsed() / STEPS as u32
                });
            });
        }
    }
    group.finish();
}

fn update(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("whole update");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for (name, config) in SHAPES {
        for algorithm in ["C-AdvIPO", "C-AdvUL"] {
            let mut trainer = trainer(model(config()), algorithm);
            group.bench_function(BenchmarkId::new(name, algorithm), |bencher| {
                bencher.iter(|| black_box(trainer.step().expect("the update runs")));
            });
        }
    }
    group.finish();
}

fn trainer(model: Decoder, algorithm: &str) -> AdversarialTrainer<Decoder> {
    let utility_rows = if algorithm == "C-AdvUL" { UTILITY_ROWS } else { 0 };
    let utility = |index: usize| {
        let prompt = tokens(100 + index, PROMPT, TokenKind::User);
        row(format!("utility/{index}"), prompt, &[(ContinuationKind::Utility, TARGET)])
    };
    let data = TrainingData { robust: harmful_rows(false), utility: (0..utility_rows).map(utility).collect() };
    let settings = TrainSettings {
        epochs: 1000,
        batch_size: ROWS + utility_rows,
        utility_share: utility_rows as f64 / (ROWS + utility_rows) as f64,
        ..TrainSettings::default()
    };
    let builder = AdversarialTrainer::builder(model)
        .attack(Pgd { steps: STEPS, ..Pgd::default() }, AttackSettings::default())
        .utility(SupervisedLoss::default())
        .data(data)
        .settings(settings);
    let builder = match algorithm {
        "C-AdvUL" => builder.robust(AdvUlLoss::default()),
        _ => builder.robust(AdvIpoLoss::default()),
    };
    builder.build().expect("everything fits together")
}

criterion_group!(benches, attack, update);
criterion_main!(benches);
