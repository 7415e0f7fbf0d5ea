//! Shared by the tests of training: rows and settings of a small run, and its end.
#![allow(dead_code, reason = "each test crate uses a part")]

use std::sync::{Mutex, MutexGuard, PoisonError, atomic::AtomicBool};

use advtrain::{AdversarialTrainer, Decoder, Finish, OptimizerConfig, TrainSettings, TrainableLm, TrainingData};

use super::toy::{numbers, robust, useful};

pub const UPDATES: usize = 6;

/// Dropout draws from libtorch's generator, which all threads share: tests that train take turns.
static GENERATOR: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn mixed() -> TrainingData {
    TrainingData { robust: (0..7).map(robust).collect(), utility: (0..5).map(useful).collect() }
}

pub fn settings() -> TrainSettings {
    TrainSettings {
        seed: 11,
        max_updates: Some(UPDATES),
        batch_size: 4,
        micro_batch_size: 2,
        utility_share: 0.25,
        checkpoint_every: 2,
        optimizer: OptimizerConfig { learning_rate: 1e-2, ..OptimizerConfig::default() },
        ..TrainSettings::default()
    }
}

/// Every trained number, in order.
pub fn weights(model: &impl TrainableLm) -> Vec<f64> {
    model.parameters().iter().flat_map(|one| numbers(&one.tensor)).collect()
}

pub fn run_to_end(trainer: &mut AdversarialTrainer<Decoder>) -> Vec<f64> {
    assert_eq!(trainer.run(&AtomicBool::new(false)).unwrap(), Finish::Completed);
    weights(trainer.model())
}
