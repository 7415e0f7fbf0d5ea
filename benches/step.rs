//! Time of one attack iteration and of one whole update, on random models of real shapes, and of the matrix product that
//! says what the machine could do.
//!
//! ```sh
//! cargo bench --bench step                    # all
//! cargo bench --bench step -- smollm2-135m    # one shape
//! ```
//!
//! Eight harmful rows of 64 prompt and 24 target tokens, safe answers of 8; ragged: prompts from 16 to 64 tokens. The C-AdvUL
//! update has 56 utility rows besides. LoRA of rank 64 on every linear layer; float32, and bfloat16 where the processor
//! multiplies it. `BENCH_DEVICE=cuda` runs the shape gemma-2b in bfloat16 on a GPU.

mod common;

use std::{cell::OnceCell, hint::black_box, time::Instant};

use advtrain::{
    Dtype,
    tch::{Device, Kind, Tensor},
};
use common::{ALGORITHMS, LENGTHS, Lengths, STEPS, device, dtypes, shapes, synchronize, warmed};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};

fn attack(criterion: &mut Criterion) {
    for (dtype, suffix) in dtypes() {
        let mut group = criterion.benchmark_group(format!("attack{suffix}"));
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        for (shape, lengths) in rows() {
            // Criterion calls the function for every sample, and not at all where it is filtered out.
            let model = OnceCell::new();
            let mut attack = None;
            group.bench_function(BenchmarkId::new(shape, lengths.name()), |bencher| {
                let model = model.get_or_init(|| common::model(shape, dtype));
                let attack = attack.get_or_insert_with(|| warmed(common::attack(model, lengths)));
                // A whole attack is run, merging the adapter included, and its time divided.
                bencher.iter_custom(|attacks| {
                    let begin = Instant::now();
                    (0..attacks).for_each(|_| attack());
                    begin.elapsed() / STEPS as u32
                });
            });
        }
        group.finish();
    }
}

fn update(criterion: &mut Criterion) {
    for (dtype, suffix) in dtypes() {
        for algorithm in ALGORITHMS {
            let mut group = criterion.benchmark_group(format!("{}{suffix}", algorithm.name()));
            group.sample_size(10).sampling_mode(SamplingMode::Flat);
            for (shape, lengths) in rows() {
                let mut update = None;
                group.bench_function(BenchmarkId::new(shape, lengths.name()), |bencher| {
                    let make = || warmed(common::update(common::model(shape, dtype), algorithm, lengths));
                    let update = update.get_or_insert_with(make);
                    bencher.iter(update);
                });
            }
            group.finish();
        }
    }
}

fn rows() -> impl Iterator<Item = (&'static str, Lengths)> {
    shapes().iter().flat_map(|shape| LENGTHS.map(|lengths| (*shape, lengths)))
}

/// Two square matrices: operations per second are what an iteration's floor is computed from. On a CPU `float32` is what libtorch
/// does by itself, `float32-onednn` the same as a convolution, as this crate has its products done.
fn product(criterion: &mut Criterion) {
    let (device, size) = (device(), if device().is_cuda() { 8192 } else { 2048 });
    let mut group = criterion.benchmark_group("product");
    group.throughput(Throughput::Elements(2 * (size * size * size) as u64));
    let random = || Tensor::randn([size, size], (Kind::Float, device));
    let [left, right] = [random(), random()];
    let mut time = |name: &str, product: &dyn Fn() -> Tensor| {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let _ = black_box(product());
                synchronize();
            });
        });
    };
    if dtypes().iter().all(|(dtype, _)| *dtype != Dtype::Bfloat16) {
        eprintln!("bfloat16: left out, this processor has no unit for it");
    }
    for (dtype, _) in dtypes() {
        let [left, right] = [&left, &right].map(|one| one.to_kind(dtype.on(device)));
        time(&dtype.to_string(), &|| left.matmul(&right));
    }
    if device == Device::Cpu {
        let (picture, kernel) = (left.view([1, size, 1, size]).permute([0, 3, 1, 2]), right.view([size, size, 1, 1]));
        time("float32-onednn", &|| picture.conv2d(&kernel, None::<&Tensor>, [1, 1], [0, 0], [1, 1], 1));
    }
    group.finish();
}

criterion_group!(benches, product, attack, update);
criterion_main!(benches);
