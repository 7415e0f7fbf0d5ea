//! Makes utility chats of a model's own answers: to harmless requests of a file, and to requests that it writes itself.
//!
//! ```sh
//! cargo run --release --example self_distil -- --model path/to/model \
//!     --requests examples/data/harmless_training.txt --drawn 500 --out runs/own_chats.jsonl
//! ```

mod support;

use std::{collections::HashSet, path::PathBuf, sync::atomic::Ordering};

use advtrain::{
    ChatFormat, Decoder, Dtype, Finish, Generation, Request, Sampling, SelfDistilled, device, drawn_requests,
    load_harmless, save_chats, self_distilled,
};
use anyhow::{Result, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use support::{
    inputs::stem,
    job::{self, STOP},
};

/// Tokens of a request that the model writes: of those that are longer it has not written the end.
const LONGEST_REQUEST: usize = 160;

/// Makes utility chats of a model's own answers to harmless requests, and to requests that it writes itself.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// A Hugging Face model folder
    #[arg(long)]
    model: PathBuf,
    /// Text with a harmless request on each line; several with commas
    #[arg(long, value_delimiter = ',', required_unless_present = "drawn")]
    requests: Vec<PathBuf>,
    /// Let the model write so many requests too; those that come twice or do not end in 160 tokens are left out
    #[arg(long, default_value_t = 0)]
    drawn: usize,
    /// Decides what it writes
    #[arg(long, default_value_t = 0)]
    seed: u64,
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
    let mut known = HashSet::new();
    let mut sources = Vec::new();
    for path in &arguments.requests {
        let named = |one: Request| Request { id: format!("{}/{}", stem(path), one.id), ..one };
        sources.push((path.display().to_string(), load_harmless(path)?.into_iter().map(named).collect()));
    }
    let Some(drawn) = drawn(arguments, &model, &format)? else { return Ok(Finish::Stopped) };
    sources.push(("drawn requests".to_string(), drawn));
    for (place, mut requests) in sources {
        requests.retain(|request| known.insert(request.text.clone()));
        let bar = bar(&place, requests.len())?;
        for some in requests.chunks(arguments.rows.max(1)) {
            if STOP.load(Ordering::Relaxed) {
                return Ok(Finish::Stopped);
            }
            let found = self_distilled(&model, &format, some, &place, &generation, arguments.rows)?;
            all.chats.extend(found.chats);
            all.left_out.extend(found.left_out);
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

/// What the model writes where the user should speak; none if it was stopped.
fn drawn(arguments: &Arguments, model: &Decoder, format: &ChatFormat) -> Result<Option<Vec<Request>>> {
    let sampling = Some(Sampling { top_p: 0.95, seed: arguments.seed, ..Sampling::default() });
    let generation = Generation { max_new_tokens: LONGEST_REQUEST, end_ids: Vec::new(), sampling };
    let bar = bar("writing requests", arguments.drawn)?;
    let mut requests = Vec::new();
    for from in (0..arguments.drawn).step_by(arguments.rows.max(1)) {
        if STOP.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let numbers = from..arguments.drawn.min(from + arguments.rows.max(1));
        bar.inc(numbers.len() as u64);
        requests.extend(drawn_requests(model, format, numbers, &generation, arguments.rows)?);
    }
    bar.finish_and_clear();
    Ok(Some(requests))
}

fn bar(doing: &str, length: usize) -> Result<ProgressBar> {
    let bar = ProgressBar::new(length as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
    bar.set_message(doing.to_string());
    Ok(bar)
}
