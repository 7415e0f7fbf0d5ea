//! The training loop and what belongs to it.

mod attack_watch;
mod builder;
mod card;
mod checkpoint;
mod data;
mod identity;
mod metrics;
mod observer;
mod optimizer;
mod resume;
mod schedule;
mod settings;
mod tensorboard;
mod trainer;

pub use builder::TrainerBuilder;
pub use card::ModelCard;
pub use data::TrainingData;
pub use metrics::{AttackMetrics, UpdateMetrics, metrics_array};
pub use observer::{JsonLines, Observer, Progress};
pub use optimizer::OptimizerConfig;
pub use schedule::{Schedule, ScheduleShape};
pub use settings::{Grouping, TrainSettings};
pub use tensorboard::TensorBoard;
pub use trainer::{AdversarialTrainer, Finish};
