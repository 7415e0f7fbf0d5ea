//! Memory of an attack or of a whole update: the peak while it runs, less what was resident once the model was built.
//!
//! ```sh
//! cargo bench --bench memory -- attack gemma-small equal
//! ```
//!
//! Prints MiB as a number. Linux alone: it reads `/proc`.

mod common;

use std::fs;

use advtrain::Dtype;
use common::{ALGORITHMS, LENGTHS};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let [row, shape, lengths, rest @ ..] = arguments.as_slice() else {
        eprintln!("usage: memory attack|advipo|advul SHAPE equal|ragged [DTYPE]");
        return;
    };
    let dtype: Dtype = rest.first().map_or("float32", String::as_str).parse().expect("a dtype");
    let lengths = LENGTHS.into_iter().find(|one| one.name() == lengths).expect("lengths are equal or ragged");
    let model = common::model(shape, dtype);
    fs::write("/proc/self/clear_refs", "5").expect("the peak can be reset");
    let built = resident("VmRSS:");
    let twice = |work: &mut dyn FnMut()| (0..2).for_each(|_| work());
    if row == "attack" {
        twice(&mut common::attack(&model, lengths));
    } else {
        let algorithm = ALGORITHMS.into_iter().find(|one| one.name() == row).expect("rows are attack, advipo or advul");
        twice(&mut common::update(model, algorithm, lengths));
    }
    println!("{}", (resident("VmHWM:") - built) / 1024);
}

/// A field of this process's status, in KiB.
fn resident(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("this is Linux");
    let line = status.lines().find(|line| line.starts_with(field)).expect("the field is there");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number of KiB")
}
