//! Makes utility chats of a model's own answers to harmless requests.
//!
//! ```sh
//! cargo run --release --example self_distil -- --model path/to/model \
//!     --requests examples/data/harmless_training.txt --out runs/own_chats.jsonl
//! ```

mod support;

use std::{path::PathBuf, sync::atomic::Ordering};

use advtrain::{
    ChatFormat, Decoder, Dtype, Finish, Generation, SelfDistilled, device, load_harmless, save_chats, self_distilled,
};
use anyhow::{Result, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use support::{
    inputs::stem,
    job::{self, STOP},
};

/// Makes utility chats of a model's own answers to harmless requests.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// A Hugging Face model folder
    #[arg(long)]
    model: PathBuf,
    /// Text with a harmless request on each line; several with commas
    #[arg(long, value_delimiter = ',', required = true)]
    requests: Vec<PathBuf>,
    /// Longest answer, in tokens; train on no more of them: data.utility_tokens
    #[arg(long, default_value_t = 48)]
    max_new_tokens: usize,
    /// Requests answered together
    #[arg(long, default_value_t = 8)]
    rows: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// JSONL of chats, as the training examples read it
    #[arg(long)]
    out: PathBuf,
}

fn main() {
    job::ended(|| distil(&Arguments::parse()));
}

fn distil(arguments: &Arguments) -> Result<Finish> {
    let device = device(&arguments.device)?;
    let format = ChatFormat::load(&arguments.model)?;
    let model = Decoder::load(&arguments.model, Dtype::Auto.on(device), device)?;
    let generation = Generation { max_new_tokens: arguments.max_new_tokens, end_ids: format.end_ids(), sampling: None };
    let mut all = SelfDistilled::default();
    for path in &arguments.requests {
        let (requests, name) = (load_harmless(path)?, stem(path));
        let bar = ProgressBar::new(requests.len() as u64);
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
        bar.set_message(name.clone());
        for some in requests.chunks(arguments.rows.max(1)) {
            if STOP.load(Ordering::Relaxed) {
                return Ok(Finish::Stopped);
            }
            let place = path.display().to_string();
            let found = self_distilled(&model, &format, some, &place, &generation, arguments.rows)?;
            let named = |id: String| format!("{name}/{id}");
            all.chats.extend(found.chats.into_iter().map(|chat| advtrain::Chat { id: named(chat.id), ..chat }));
            all.left_out.extend(found.left_out.into_iter().map(named));
            bar.inc(some.len() as u64);
        }
        bar.finish_and_clear();
    }
    if all.chats.is_empty() {
        bail!("the model answered none of the requests");
    }
    save_chats(&arguments.out, &all.chats)?;
    println!("{}: {} chats", arguments.out.display(), all.chats.len());
    if !all.left_out.is_empty() {
        println!("refused or without text, left out: {}", all.left_out.join(", "));
    }
    Ok(Finish::Completed)
}
