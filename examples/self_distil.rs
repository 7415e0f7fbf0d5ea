//! Makes utility chats of a model's own answers: to harmless requests of a file, and to requests that it writes itself.
//!
//! ```sh
//! cargo run --release --example self_distil -- --model path/to/model \
//!     --requests examples/data/harmless_training.txt --drawn 500 --out runs/own_chats.jsonl
//! ```

mod support;

use std::{collections::HashSet, num::NonZeroUsize, ops::Range, path::PathBuf, sync::atomic::Ordering};

use advtrain::{
    CausalLm, ChatFormat, Date, Decoder, Dtype, Finish, Generation, JsonLines, Request, Sampling, SelfDistilled,
    TrainableLm, device, drawn_requests, load_harmless, save_chats, self_distilled,
};
use anyhow::{Context, Result, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
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
    #[arg(long, default_value = "8")]
    rows: NonZeroUsize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, float32, bfloat16 or float16
    #[arg(long, default_value = "auto")]
    dtype: Dtype,
    /// JSONL of chats, as the training examples read it
    #[arg(long)]
    out: PathBuf,
}

fn main() {
    job::ended(|| distil(&Arguments::parse()));
}

/// What is worked on together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Piece {
    /// Requests of a file.
    Given { file: String, requests: Vec<Request> },
    /// Requests that the model writes.
    Drawn { numbers: Range<usize>, seed: u64 },
}

/// A piece that is done, on the way kept in a file beside the chats': a distillation that was stopped goes on behind it.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    /// The model and how it answers.
    of: String,
    /// What the template prints, if it prints a date.
    date: Option<Date>,
    piece: Piece,
    found: SelfDistilled,
}

fn distil(arguments: &Arguments) -> Result<Finish> {
    let device = device(&arguments.device)?;
    let format = ChatFormat::load(&arguments.model)?;
    let model = Decoder::load(&arguments.model, arguments.dtype.on(device), device)?;
    let (weights, kind, template) = (model.fingerprint()?, model.kind(), format.template().hash());
    let of = format!("{weights} in {kind:?}, {template}, {} tokens", arguments.max_new_tokens);
    let journal = arguments.out.with_extension("partial");
    let mut lines = JsonLines::open(&journal, |_: &Done| true)?;
    let known: Vec<Done> = JsonLines::read(&journal)?;
    if let Some(other) = known.iter().find(|done| done.of != of) {
        bail!("{}: begun as {}, and not as {of}; go on with that, or remove the file", journal.display(), other.of);
    }
    // The date of the first day stays that of the others.
    let format = match known.first().and_then(|done| done.date) {
        Some(date) => format.with_date(date),
        None => format,
    };
    let date = format.template().uses_clock().then(|| format.template().date());
    let pieces = pieces(arguments)?;
    let mut all = Vec::with_capacity(pieces.len());
    let bar = ProgressBar::new(pieces.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} pieces, {eta} left")?);
    for piece in pieces {
        if let Some(done) = known.iter().find(|done| done.piece == piece) {
            all.push(done.found.clone());
        } else {
            if STOP.load(Ordering::Relaxed) {
                return Ok(Finish::Stopped);
            }
            let found = distilled(&piece, &model, &format, arguments)?;
            let done = Done { of: of.clone(), date, piece, found };
            lines.add(&done)?;
            all.push(done.found);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    write(arguments, all)?;
    std::fs::remove_file(&journal).with_context(|| journal.display().to_string())?;
    Ok(Finish::Completed)
}

fn pieces(arguments: &Arguments) -> Result<Vec<Piece>> {
    let (rows, drawn) = (arguments.rows.get(), arguments.drawn);
    let mut pieces = Vec::new();
    for (at, path) in arguments.requests.iter().enumerate() {
        if let Some(other) = arguments.requests[..at].iter().find(|other| stem(other) == stem(path)) {
            let (other, path) = (other.display(), path.display());
            bail!("--requests {other},{path}: requests are numbered under the file's name, which must differ");
        }
        let named = |one: Request| Request { id: format!("{}/{}", stem(path), one.id), ..one };
        let requests: Vec<Request> = load_harmless(path)?.into_iter().map(named).collect();
        let piece =
            |requests: &[Request]| Piece::Given { file: path.display().to_string(), requests: requests.to_vec() };
        pieces.extend(requests.chunks(rows).map(piece));
    }
    let piece = |from: usize| Piece::Drawn { numbers: from..drawn.min(from + rows), seed: arguments.seed };
    pieces.extend((0..drawn).step_by(rows).map(piece));
    Ok(pieces)
}

fn distilled(piece: &Piece, model: &Decoder, format: &ChatFormat, arguments: &Arguments) -> Result<SelfDistilled> {
    let (requests, place) = match piece {
        Piece::Given { file, requests } => (requests.clone(), file.as_str()),
        Piece::Drawn { numbers, seed } => {
            let sampling = Some(Sampling { top_p: 0.95, seed: *seed, ..Sampling::default() });
            let generation = Generation { max_new_tokens: LONGEST_REQUEST, end_ids: Vec::new(), sampling };
            (drawn_requests(model, format, numbers.clone(), &generation, arguments.rows.get())?, "drawn requests")
        }
    };
    let generation = Generation { max_new_tokens: arguments.max_new_tokens, end_ids: format.end_ids(), sampling: None };
    Ok(self_distilled(model, format, &requests, place, &generation, arguments.rows.get())?)
}

/// Each request once.
fn write(arguments: &Arguments, all: Vec<SelfDistilled>) -> Result<()> {
    let mut known = HashSet::new();
    let (mut chats, mut left_out) = (Vec::new(), Vec::new());
    for found in all {
        chats.extend(found.chats.into_iter().filter(|chat| known.insert(chat.messages[0].content.clone())));
        left_out.extend(found.left_out);
    }
    if chats.is_empty() {
        bail!("the model answered none of the requests");
    }
    save_chats(&arguments.out, &chats)?;
    println!("{}: {} chats", arguments.out.display(), chats.len());
    if !left_out.is_empty() {
        println!("refused or without text, left out: {}", left_out.join(", "));
    }
    Ok(())
}
