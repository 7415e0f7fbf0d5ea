//! How the time of an attack grows with its iterations, with the rows attacked together, and with the length of their prompts;
//! the others as in the benchmark `step`: ten iterations, eight rows, 64 tokens.
//!
//! ```sh
//! cargo bench --bench growth -- --quick
//! ```
//!
//! Where rows or prompts grow, the time is that of one iteration of two.

mod common;

use std::time::Instant;

use advtrain::Decoder;
use common::{PROMPT, ROWS, dtypes, shapes, warmed};
use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};

fn steps(criterion: &mut Criterion) {
    group(criterion, "steps", &[1, 2, 5, 10, 20], 1, |model, steps| {
        Box::new(common::attack_of_size(model, ROWS, PROMPT, steps))
    });
}

fn rows(criterion: &mut Criterion) {
    group(criterion, "rows", &[1, 2, 4, 8, 16, 32, 64], 2, |model, rows| {
        Box::new(common::attack_of_size(model, rows, PROMPT, 2))
    });
}

fn prompt(criterion: &mut Criterion) {
    group(criterion, "prompt", &[32, 64, 128, 256, 512], 2, |model, prompt| {
        Box::new(common::attack_of_size(model, ROWS, prompt, 2))
    });
}

/// Times what `work` makes of each size, as `parts` equal parts.
fn group(
    criterion: &mut Criterion,
    name: &str,
    sizes: &[usize],
    parts: u32,
    work: for<'a> fn(&'a Decoder, usize) -> Box<dyn FnMut() + 'a>,
) {
    for shape in shapes() {
        let mut group = criterion.benchmark_group(format!("growth-{name}-{shape}"));
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        let model = common::model(shape, dtypes()[0].0);
        for size in sizes {
            let mut attack = None;
            group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
                let attack = attack.get_or_insert_with(|| warmed(work(&model, *size)));
                bencher.iter_custom(|attacks| {
                    let begin = Instant::now();
                    (0..attacks).for_each(|_| attack());
                    begin.elapsed() / parts
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, steps, rows, prompt);
criterion_main!(benches);
