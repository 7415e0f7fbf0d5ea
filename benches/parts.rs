//! What single optimisations save: each pair is the same work without and with one of them.
//!
//! ```sh
//! cargo bench --bench parts -- --quick
//! ```
//!
//! | group | without | with |
//! |---|---|---|
//! | `adapter` | an iteration of the attack with the adapter beside the weights | merged into them |
//! | `harmful-alone` | an iteration over both continuations | over the harmful one |
//! | `shared-prompt` | the losses' pass over each continuation with a prompt of its own, forward and back | behind one prompt |
//! | `like-lengths` | four such passes over rows of 56 to 536 tokens as they come | sorted by length |
//! | `references` | the reference values of the rows, which are otherwise read from what was computed once | nothing |

mod common;

use std::time::Instant;

use advtrain::{
    AdvIpoLoss, Batch, CausalLm,
    ContinuationKind::{self, Harmful, Safe},
    Decoder, Example, Hidden, Input, Last, Pass, Result, RobustLoss, TrainableLm,
    tch::{Kind, Tensor, no_grad},
};
use common::{Lengths, STEPS, device, dtypes, harmful_rows, shapes, synchronize};
use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};

/// Prompts of a micro-batch of chats, in tokens.
const CHATS: [usize; 8] = [32, 64, 96, 128, 192, 256, 384, 512];

/// A decoder whose adapter stays beside the weights while it is attacked.
struct Beside<'a>(&'a Decoder);

impl CausalLm for Beside<'_> {
    fn layers(&self) -> usize {
        self.0.layers()
    }
    fn kind(&self) -> Kind {
        self.0.kind()
    }
    fn embedding(&self) -> &Tensor {
        self.0.embedding()
    }
    fn hidden(&self, input: &Input) -> Result<Hidden> {
        self.0.hidden(input)
    }
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.0.logits(hidden)
    }
    fn frozen(&self, _: bool) -> Result<Option<Box<dyn CausalLm + '_>>> {
        self.0.frozen(true)
    }
}

/// The log-probabilities of the targets of these kinds, summed, and the gradients of `towards`.
fn pass(model: &dyn CausalLm, batch: &Batch, kinds: &[ContinuationKind], embeddings: &Tensor, towards: &[Tensor]) {
    let pass = Pass { last: Last::Predictors, ..Pass::default() };
    let input = Input::of_embeddings(embeddings.shallow_clone(), batch.layout(), pass).expect("embeddings fit");
    let hidden = model.hidden(&input).expect("the pass runs");
    let sums = kinds.iter().map(|kind| {
        let targets = batch.targets(*kind).expect("targets");
        let predicting = hidden.predicting(&targets).expect("predictors");
        model.log_probs(&predicting, &targets.ids).expect("log-probabilities").sum(None)
    });
    let gradients = Tensor::run_backward(&[sums.reduce(|a, b| a + b).expect("a kind")], towards, false, false);
    drop(gradients);
    synchronize();
}

fn batch(examples: &[Example], kinds: &[ContinuationKind]) -> Batch {
    Batch::new(examples.iter().map(|example| example.keep(kinds)).collect(), device()).expect("rows")
}

/// The losses' pass: gradients of the adapter.
fn losses<'m>(model: &'m Decoder, examples: &[Example], kinds: &[ContinuationKind]) -> impl FnMut() + use<'m> {
    let batch = batch(examples, kinds);
    let towards: Vec<Tensor> = model.parameters().into_iter().map(|one| one.tensor).collect();
    let kinds = kinds.to_vec();
    move || pass(model, &batch, &kinds, &model.embed(batch.ids()).expect("ids"), &towards)
}

/// The attack's pass: gradients of the embeddings.
fn iteration<'m>(model: &'m dyn CausalLm, examples: &[Example], kinds: &[ContinuationKind]) -> impl FnMut() + use<'m> {
    let batch = batch(examples, kinds);
    move || {
        let embeddings = model.embed(batch.ids()).expect("ids").detach().set_requires_grad(true);
        pass(model, &batch, &[Harmful], &embeddings, std::slice::from_ref(&embeddings));
    }
}

fn parts(criterion: &mut Criterion) {
    for shape in shapes() {
        let model = &common::model(shape, dtypes()[0].0);
        let rows = harmful_rows(Lengths::Equal);
        let both = [Harmful, Safe];

        let beside = Beside(model);
        pair(
            criterion,
            ("adapter", shape, STEPS),
            common::attack_rows(&beside, rows.clone(), STEPS),
            common::attack_rows(model, rows.clone(), STEPS),
        );
        let frozen = model.frozen(false).expect("it merges").expect("a decoder does");
        let alone = iteration(&*frozen, &rows, &[Harmful]);
        pair(criterion, ("harmful-alone", shape, 1), iteration(&*frozen, &rows, &both), alone);

        let mut parts = both.map(|kind| losses(model, &rows, &[kind]));
        let apart = move || parts.iter_mut().for_each(|part| part());
        pair(criterion, ("shared-prompt", shape, 1), apart, losses(model, &rows, &both));

        // As rows come: each micro-batch has short and long ones. Longer than elsewhere, as chats are.
        let ragged: Vec<Vec<Example>> = (0..4).map(|_| common::rows_of_lengths(&CHATS)).collect();
        let mut sorted = ragged.concat();
        sorted.sort_by_key(Example::len);
        let all = |parts: Vec<Vec<Example>>| {
            let mut parts: Vec<_> = parts.iter().map(|rows| losses(model, rows, &[Harmful])).collect();
            move || parts.iter_mut().for_each(|part| part())
        };
        let sorted = sorted.chunks(CHATS.len()).map(<[_]>::to_vec).collect();
        pair(criterion, ("like-lengths", shape, 1), all(ragged), all(sorted));

        let batch = batch(&rows, &both);
        let references = || {
            no_grad(|| AdvIpoLoss::default().precompute(model, &batch)).expect("the reference answers");
            synchronize();
        };
        pair(criterion, ("references", shape, 1), references, || {});
    }
}

/// Times the same work without and with an optimisation, as so many equal parts.
fn pair(criterion: &mut Criterion, what: (&str, &str, usize), mut without: impl FnMut(), mut with: impl FnMut()) {
    let (name, shape, parts) = what;
    let mut group = criterion.benchmark_group(format!("parts-{name}-{shape}"));
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for (how, work) in [("without", &mut without as &mut dyn FnMut()), ("with", &mut with)] {
        group.bench_function(BenchmarkId::from_parameter(how), |bencher| {
            bencher.iter_custom(|times| {
                let begin = Instant::now();
                (0..times).for_each(|_| work());
                begin.elapsed() / parts as u32
            });
        });
    }
    group.finish();
}

criterion_group!(benches, parts);
criterion_main!(benches);
