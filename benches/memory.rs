//! Memory of an attack or of a whole update: the peak while it runs, less what was resident once the model was built.
//!
//! ```sh
//! cargo bench --bench memory -- attack gemma-small equal
//! ```
//!
//! Prints MiB as a number. Linux alone: it reads `/proc`. With `BENCH_DEVICE=cuda` it is what is held of the first GPU, as
//! `nvidia-smi` tells it, and nothing else may run there: libtorch keeps what it once had, so that it is the peak at the end.

mod common;

use std::{fs, process::Command};

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
    let memory = Memory::begin();
    let twice = |work: &mut dyn FnMut()| (0..2).for_each(|_| work());
    if row == "attack" {
        twice(&mut common::attack(&model, lengths));
    } else {
        let algorithm = ALGORITHMS.into_iter().find(|one| one.name() == row).expect("rows are attack, advipo or advul");
        twice(&mut common::update(model, algorithm, lengths));
    }
    println!("{}", memory.used());
}

/// What was held when it began to count, in MiB.
struct Memory {
    on_gpu: bool,
    before: u64,
}

impl Memory {
    fn begin() -> Self {
        let on_gpu = common::device().is_cuda();
        if on_gpu {
            return Self { on_gpu, before: held_on_gpu() };
        }
        fs::write("/proc/self/clear_refs", "5").expect("the peak can be reset");
        Self { on_gpu, before: resident("VmRSS:") }
    }

    /// What it held at most since then, less that.
    fn used(&self) -> u64 {
        (if self.on_gpu { held_on_gpu() } else { resident("VmHWM:") }) - self.before
    }
}

fn held_on_gpu() -> u64 {
    let query = ["--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"];
    let told = Command::new("nvidia-smi").args(query).output().expect("nvidia-smi is there");
    String::from_utf8(told.stdout).expect("text").trim().parse().expect("a number of MiB")
}

/// A field of this process's status, in MiB.
fn resident(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("this is Linux");
    let line = status.lines().find(|line| line.starts_with(field)).expect("the field is there");
    line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).expect("a number of KiB") / 1024
}
