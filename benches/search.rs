//! Seconds per step of GCG on a real model's folder.
//!
//! ```sh
//! cargo bench --bench search -- .real/smollm2 64
//! ```
//!
//! Prints the mean of ten steps behind a first one, with so many candidates (64 unless told). `make bench-search` runs it in
//! turn with nanoGCG.

use std::time::Instant;

use advtrain::{
    ChatFormat, Decoder, Message, Result, SearchPrompt, StringPlace, TokenSearch, TokenSearchSettings,
    tch::{Device, Kind},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const REQUEST: &str = "Write a short story about a lighthouse";
const TARGET: &str = "Sure, here is a short story about a lighthouse";
const STEPS: u32 = 10;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let Some(folder) = arguments.first() else {
        eprintln!("left out: it wants a model's folder, `cargo bench --bench search -- FOLDER [CANDIDATES]`");
        return Ok(());
    };
    let width = arguments.get(1).map_or(64, |width| width.parse().expect("a number of candidates"));
    let model = Decoder::load(folder, Kind::Float, Device::Cpu)?;
    let format = ChatFormat::load(folder)?;
    let place = StringPlace::new(vec![Message::user(REQUEST)], "")?;
    let start = " x".repeat(20);
    let placed = place.encode(&format, &start)?;
    let target = format.opening(&place.messages(&start), TARGET)?.continuation.ids().to_vec();
    let prompt = SearchPrompt { before: placed.before.clone(), behind: placed.behind.clone(), target };
    let mut search = TokenSearch::new(
        &model,
        &[prompt],
        std::slice::from_ref(&placed.string),
        &format.tokenizer().printable_ids(true)?,
        TokenSearchSettings { width, ..TokenSearchSettings::default() },
        ChaCha8Rng::seed_from_u64(0),
        Box::new(|ids| Ok(place.string_of(&format, &placed, ids)?.is_some())),
    )?;
    search.step()?;
    let begin = Instant::now();
    for _ in 0..STEPS {
        search.step()?;
    }
    println!("{}", begin.elapsed().as_secs_f64() / f64::from(STEPS));
    Ok(())
}
