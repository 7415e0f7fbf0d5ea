//! Is the trained model harder to break, and still useful?

mod attacks;
mod case;
mod completions;
mod helper;
mod judge;
mod measuring;
mod record;
mod report;
mod settings;
mod tasks;

pub use self::{
    attacks::*, case::*, completions::*, helper::*, judge::*, measuring::*, record::*, report::*, settings::*, tasks::*,
};
