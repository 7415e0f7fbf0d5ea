//! Attacks on one case after another, by text and on embeddings, behind one seam.

mod autodan;
mod continuous;
mod direct;
mod gcg;
mod pair;
mod prompt_attack;
mod replay;
mod requirements;

pub use autodan::{AutoDan, AutoDanSettings, Synonyms};
pub use continuous::{Continuous, ContinuousSettings};
pub use direct::{Direct, DirectSettings};
pub use gcg::{Gcg, GcgSettings, GcgStop, UniversalSuffix};
pub use pair::{Pair, PairSettings};
pub use prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch};
pub use replay::{GivenAnswers, Replay};
