//! The rows and models of the benchmarks: the same for time and for memory, and for the peers under `benches/peers`.
#![allow(dead_code, reason = "each benchmark uses a part")]

use advtrain::{
    AdvIpoLoss, AdvUlLoss, AdversarialTrainer, AttackRunner, AttackSettings, Batch, Continuation, ContinuationKind,
    Decoder, Draws, Dtype, Example, LoraConfig, Pgd, SupervisedLoss, TargetCrossEntropy, TokenKind, Tokens,
    TrainSettings, TrainingData,
    tch::{Cuda, Device},
};
use serde_json::Value;

pub const LENGTHS: [Lengths; 2] = [Lengths::Equal, Lengths::Ragged];
pub const ALGORITHMS: [Algorithm; 2] = [Algorithm::AdvIpo, Algorithm::AdvUl];

pub const ROWS: usize = 8;
const UTILITY_ROWS: usize = 56;
pub const PROMPT: usize = 64;
const TARGET: usize = 24;
const SAFE: usize = 8;
/// Iterations of one attack.
pub const STEPS: usize = 10;

/// Prompts of one length, or from a quarter of it to all of it.
#[derive(Clone, Copy, PartialEq)]
pub enum Lengths {
    Equal,
    Ragged,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Algorithm {
    AdvIpo,
    AdvUl,
}

/// The same work, done once: what is allocated in it is then there, also for `--quick`, which has no warm-up of its own.
pub fn warmed<W: FnMut()>(mut work: W) -> W {
    work();
    work
}

impl Lengths {
    pub fn name(self) -> &'static str {
        if self == Self::Equal { "equal" } else { "ragged" }
    }

    fn prompt(self, row: usize, rows: usize) -> usize {
        let shortest = if self == Self::Equal { PROMPT } else { PROMPT / 4 };
        shortest + (PROMPT - shortest) * row / (rows - 1)
    }
}

impl Algorithm {
    pub fn name(self) -> &'static str {
        if self == Self::AdvIpo { "advipo" } else { "advul" }
    }
}

/// The device that BENCH_DEVICE names; without it, the CPU.
pub fn device() -> Device {
    let name = std::env::var("BENCH_DEVICE").unwrap_or_else(|_| "cpu".into());
    advtrain::device(&name).expect("BENCH_DEVICE is a device that is there")
}

/// The shapes of `benches/shapes.json` that fit the device.
pub fn shapes() -> &'static [&'static str] {
    if device().is_cuda() { &["gemma-2b"] } else { &["gemma-small", "smollm2-135m"] }
}

/// Waits until the device has done what it was given.
pub fn synchronize() {
    if let Device::Cuda(index) = device() {
        Cuda::synchronize(index as i64);
    }
}

/// The dtypes that are worth timing on this device, and what a benchmark's name has of them.
pub fn dtypes() -> Vec<(Dtype, &'static str)> {
    if device().is_cuda() {
        return vec![(Dtype::Bfloat16, "-bfloat16")];
    }
    let mut dtypes = vec![(Dtype::Float32, "")];
    if advtrain::has_bfloat16_unit() {
        dtypes.push((Dtype::Bfloat16, "-bfloat16"));
    }
    dtypes
}

/// A random model of a shape of `benches/shapes.json`, with the paper's adapter.
pub fn model(shape: &str, dtype: Dtype) -> Decoder {
    let shapes: Value = serde_json::from_str(include_str!("../shapes.json")).expect("shapes.json is JSON");
    let config = shapes[shape].clone();
    let device = device();
    let mut model = Decoder::random(config, 0.02, 0, dtype.on(device), device).expect("the shape is a valid config");
    model.add_lora(&LoraConfig::default(), 0).expect("the default adapter fits every model");
    model
}

fn tokens(seed: usize, len: usize, kind: TokenKind) -> Tokens {
    let id = |at: usize| (5 + (seed * 7919 + at * 104_729) % 40_000) as i64;
    Tokens::of_kind((0..len).map(id).collect(), kind)
}

fn row(id: String, prompt: Tokens, answers: &[(ContinuationKind, usize)]) -> Example {
    let answer = |(kind, len): &(ContinuationKind, usize)| Continuation {
        kind: *kind,
        tokens: tokens(id.len() + *len, *len, TokenKind::Target),
    };
    let answers = answers.iter().map(answer).collect();
    Example::new(id.clone(), prompt, answers).expect("prompt and answers have tokens")
}

/// Rows with a harmful and a safe answer.
pub fn harmful_rows(lengths: Lengths) -> Vec<Example> {
    let answers = [(ContinuationKind::Harmful, TARGET), (ContinuationKind::Safe, SAFE)];
    let one = |index| {
        let prompt = tokens(index, lengths.prompt(index, ROWS), TokenKind::User);
        row(format!("harmful/{index}"), prompt, &answers)
    };
    (0..ROWS).map(one).collect()
}

/// One attack of [`STEPS`] iterations, merging the adapter included.
pub fn attack(model: &Decoder, lengths: Lengths) -> impl FnMut() {
    attack_rows(model, harmful_rows(lengths), STEPS)
}

/// An attack of `steps` iterations on `rows` rows with prompts of `prompt` tokens.
pub fn attack_of_size(model: &Decoder, rows: usize, prompt: usize, steps: usize) -> impl FnMut() {
    attack_rows(model, rows_of_lengths(&vec![prompt; rows]), steps)
}

/// Rows with prompts of these lengths and a harmful answer.
pub fn rows_of_lengths(prompts: &[usize]) -> Vec<Example> {
    let one = |(index, length): (usize, &usize)| {
        let prompt = tokens(index, *length, TokenKind::User);
        row(format!("harmful/{index}"), prompt, &[(ContinuationKind::Harmful, TARGET)])
    };
    prompts.iter().enumerate().map(one).collect()
}

fn attack_rows(model: &Decoder, rows: Vec<Example>, steps: usize) -> impl FnMut() {
    let batch = Batch::new(rows, device()).expect("rows");
    let mut attack = Pgd { steps, ..Pgd::default() };
    let mut runner = AttackRunner::new(AttackSettings::default(), &attack, model).expect("settings");
    move || {
        let draws = Draws { seed: 0, epoch: 0 };
        runner.run(&mut attack, &mut TargetCrossEntropy, model, &batch, draws).expect("the attack runs");
        synchronize();
    }
}

/// A whole update.
pub fn update(model: Decoder, algorithm: Algorithm, lengths: Lengths) -> impl FnMut() {
    let mut trainer = trainer(model, algorithm, lengths);
    move || {
        trainer.step().expect("the update runs");
        synchronize();
    }
}

fn trainer(model: Decoder, algorithm: Algorithm, lengths: Lengths) -> AdversarialTrainer<Decoder> {
    let utility_rows = if algorithm == Algorithm::AdvUl { UTILITY_ROWS } else { 0 };
    let utility = |index: usize| {
        let prompt = tokens(100 + index, lengths.prompt(index, UTILITY_ROWS), TokenKind::User);
        row(format!("utility/{index}"), prompt, &[(ContinuationKind::Utility, TARGET)])
    };
    let data = TrainingData { robust: harmful_rows(lengths), utility: (0..utility_rows).map(utility).collect() };
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
        Algorithm::AdvUl => builder.robust(AdvUlLoss::default()),
        Algorithm::AdvIpo => builder.robust(AdvIpoLoss::default()),
    };
    builder.build().expect("everything fits together")
}
