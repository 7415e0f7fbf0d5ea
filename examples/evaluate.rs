//! Attacks chat models, judges what they say, measures what they are still good for, and writes one report.
//!
//! ```sh
//! cargo run --release --example evaluate
//! cargo run --release --example evaluate -- --model path/to/model --behaviors behaviors.csv --targets targets.json \
//!     --attacks direct,gcg,autodan,embedding --utility xstest=xstest.csv --out runs/evaluation-model
//! cargo run --release --example evaluate -- --model path/to/model --adapter runs/advipo/adapter --name hardened … \
//!     --with runs/evaluation-model --out runs/evaluation-hardened
//! ```
//!
//! Without a model it hardens the toy of `advipo_gemma`, if that has not been done, and evaluates it before and after.
//! PAIR's attacker is then the toy itself, which cannot write such prompts: that only shows that everything works.
//!
//! Ctrl-C stops between two steps of a search, and else when the cases in work are done, with a report of what there is and
//! exit code 130; the same command goes on from there.

mod support;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use advtrain::{
    Access, Case, CausalLm, ChatFormat, ChatTemplate, DecoderConfig, Dtype, Evaluation, EvaluationInputs,
    EvaluationPreset, EvaluationSettings, Finish, Framing, Generation, InputFile, Judge, PromptAttack, Report,
    RunConfig, Setup, Subject, ThreatModel, Tokenizer, device, load_completions, load_test_cases, save_completions,
};
use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use support::{
    arguments::Arguments as TrainingArguments,
    assembly::{self, Assembly, AttackName, Given, Helpers, Place},
    cases::{self, Attacked, Wanted, some_of},
    inputs::{folder_name, stem},
    job::{self, STOP},
    tasks::{self, Tasks, Utility, UtilityFile, UtilityKind},
    toy, watching,
};

/// Attacks chat models and measures what they are still good for. Without a model: the toy, before and after.
///
/// Exit codes: 0 done, 1 an error, 130 stopped by Ctrl-C; the same command then goes on.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// A Hugging Face model folder
    #[arg(long, requires_all = ["behaviors", "targets"])]
    model: Option<PathBuf>,
    /// A PEFT adapter's folder
    #[arg(long, requires = "model")]
    adapter: Option<PathBuf>,
    /// The model's name in the report; without, its folder's
    #[arg(long, requires = "model")]
    name: Option<String>,
    /// Ask in one of the paper's chat templates, in place of the folder's own
    #[arg(long, value_enum, requires = "model")]
    template: Option<assembly::TemplateName>,
    /// CSV with the columns Behavior and BehaviorID (HarmBench)
    #[arg(long, requires = "model")]
    behaviors: Option<PathBuf>,
    /// JSON from behaviour id to a list of targets (HarmBench)
    #[arg(long, requires = "model")]
    targets: Option<PathBuf>,
    /// Attack behaviours of this FunctionalCategory alone (HarmBench: standard, contextual)
    #[arg(long)]
    category: Option<String>,
    /// Attack those behaviours alone that a training on this file holds out with the same --held-out, to tune on; a share
    #[arg(long)]
    held_out: Option<f64>,
    /// The --seed of that training
    #[arg(long, requires = "held_out", default_value_t = 0)]
    held_out_seed: u64,
    /// Attack so many behaviours, at even distances in the file; without, all, and 8 of the toy's
    #[arg(long)]
    cases: Option<NonZeroUsize>,
    /// Search for prompts (gcg, autodan, pair) against so many of them alone, at even distances
    #[arg(long)]
    search_cases: Option<NonZeroUsize>,
    /// What to attack with; several with commas
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = AttackName::ALL)]
    attacks: Vec<AttackName>,
    /// The attacks' settings as a TOML file, in place of a preset
    #[arg(long, conflicts_with_all = ["preset", "quick"])]
    settings: Option<PathBuf>,
    /// How much the attacks cost
    #[arg(long, value_enum, default_value = "reduced")]
    preset: assembly::PresetName,
    /// So many answers to each plain request and to each prompt of --replay, in place of the settings' direct.samples;
    /// all but the first are drawn
    #[arg(long)]
    samples: Option<NonZeroUsize>,
    /// Print the attacks' settings as TOML and end
    #[arg(long)]
    print_settings: bool,
    #[command(flatten)]
    utility: Utility,
    #[command(flatten)]
    helpers: Helpers,
    /// Prompts found elsewhere, to be asked too: HarmBench's JSON of test cases; several with commas
    #[arg(long, value_delimiter = ',')]
    replay: Vec<PathBuf>,
    /// Answers made elsewhere, to be judged too: HarmBench's JSON of completions; several with commas
    #[arg(long, value_delimiter = ',')]
    completions: Vec<PathBuf>,
    /// Folders of other evaluations that the report shows before this one; several with commas
    #[arg(long = "with", value_delimiter = ',')]
    others: Vec<PathBuf>,
    /// Try again what failed, and judge again what was not judged
    #[arg(long)]
    retry: bool,
    /// auto, cpu, cuda or cuda:N; helping models too
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, float32, bfloat16, float16; helping models too
    #[arg(long, default_value = "auto")]
    dtype: Dtype,
    /// Where records and report go; an evaluation that was stopped there goes on
    #[arg(long)]
    out: Option<PathBuf>,
    /// A run of seconds that only shows that everything works
    #[arg(long)]
    quick: bool,
}

/// One model to evaluate.
struct Candidate {
    name: String,
    model: PathBuf,
    adapter: Option<PathBuf>,
    out: PathBuf,
}

/// What is the same for all candidates, read before anything begins.
struct Inputs<'a> {
    arguments: &'a Arguments,
    settings: EvaluationSettings,
    place: Place,
    attacked: Attacked,
    /// Those of its cases that prompts are searched against.
    searched: Vec<Case>,
    /// With their names.
    given: Vec<(String, Given)>,
    utility: Utility,
    others: Vec<Evaluation>,
    told: EvaluationInputs,
}

impl Inputs<'_> {
    fn assembly(&self) -> Assembly<'_> {
        Assembly { settings: &self.settings, helpers: &self.arguments.helpers, place: self.place }
    }

    fn cases(&self, attack: AttackName) -> &[Case] {
        if attack.searches() { &self.searched } else { &self.attacked.cases }
    }
}

/// What one candidate's evaluation came to.
struct Ended {
    evaluation: Evaluation,
    finish: Finish,
    problems: Vec<String>,
}

fn main() {
    job::ended(|| evaluate(&Arguments::parse()));
}

fn evaluate(arguments: &Arguments) -> Result<Finish> {
    let settings = settings(arguments)?;
    if arguments.print_settings {
        print!("{}", settings.to_toml()?);
        return Ok(Finish::Completed);
    }
    let Some(model) = &arguments.model else { return evaluate_toy(arguments, settings) };
    let (Some(behaviors), Some(targets)) = (&arguments.behaviors, &arguments.targets) else {
        bail!("--model needs --behaviors and --targets");
    };
    let name = arguments.name.clone().unwrap_or_else(|| folder_name(model));
    let out = arguments.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("evaluation-{name}")));
    let candidate = Candidate { name, model: model.clone(), adapter: arguments.adapter.clone(), out: out.clone() };
    let most = arguments.cases.map(NonZeroUsize::get);
    let inputs = inputs(arguments, settings, [behaviors, targets], most, arguments.utility.clone())?;
    all(inputs, vec![candidate], &out)
}

/// The toy of `advipo_gemma` before and after, which is hardened first if that has not been done.
fn evaluate_toy(arguments: &Arguments, settings: EvaluationSettings) -> Result<Finish> {
    let mut training = vec!["advipo_gemma", "--device", &arguments.device];
    training.extend(arguments.quick.then_some("--quick"));
    let training = TrainingArguments::parse_from(training);
    let plan = job::Plan { name: "advipo_gemma", algorithm: advtrain::Algorithm::AdvIpo, toy: toy::advipo_settings };
    let hardened = job::out_folder(&training, &plan);
    let adapter = hardened.join("adapter");
    // Written last.
    if !adapter.join("adapter_config.json").exists() {
        eprintln!("hardening the toy first, as the example advipo_gemma does");
        if job::run(training, plan)? == Finish::Stopped {
            return Ok(Finish::Stopped);
        }
    }
    let (name, size, most) =
        if arguments.quick { ("toy-quick", toy::Size::QUICK, 2) } else { ("toy", toy::Size::FULL, 8) };
    let toy = hardened.join(name);
    let Some((model, _)) = toy::prepare(&toy, size, 0, &STOP)? else { return Ok(Finish::Stopped) };
    let [behaviors, targets, chats] = toy::held_out(&toy);
    let mut utility = arguments.utility.clone();
    if utility.files.iter().all(|file| file.kind != UtilityKind::Chats) {
        utility.files.push(UtilityFile { kind: UtilityKind::Chats, path: chats });
    }
    let most = arguments.cases.map_or(most, NonZeroUsize::get);
    let inputs = inputs(arguments, settings, [&behaviors, &targets], Some(most), utility)?;
    let out = arguments
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from(if arguments.quick { "runs/evaluation-quick" } else { "runs/evaluation" }));
    let candidate =
        |name: &str, adapter| Candidate { name: name.into(), model: model.clone(), adapter, out: out.join(name) };
    let candidates = vec![candidate("before", None), candidate("after", Some(adapter))];
    all(inputs, candidates, &out)
}

fn settings(arguments: &Arguments) -> Result<EvaluationSettings> {
    let mut settings = match &arguments.settings {
        Some(path) => EvaluationSettings::read(path)?,
        None => EvaluationSettings::preset(EvaluationPreset::from(arguments.preset), &ThreatModel::default()),
    };
    if arguments.quick {
        settings = assembly::quick(settings);
    }
    settings.direct.samples = arguments.samples.map_or(settings.direct.samples, NonZeroUsize::get);
    Ok(settings)
}

fn inputs<'a>(
    arguments: &'a Arguments,
    settings: EvaluationSettings,
    [behaviors, targets]: [&PathBuf; 2],
    most: Option<usize>,
    utility: Utility,
) -> Result<Inputs<'a>> {
    if arguments.attacks.len() > 1 && arguments.attacks.contains(&AttackName::None) {
        bail!("--attacks none cannot stand beside other attacks");
    }
    let device = device(&arguments.device)?;
    let place = Place { device, kind: arguments.dtype.on(device) };
    let held_out = arguments.held_out.map(|share| (share, arguments.held_out_seed));
    let wanted = Wanted { category: arguments.category.as_deref(), held_out, most };
    let mut attacked = cases::read(behaviors, targets, wanted)?;
    let most = arguments.search_cases.map_or(usize::MAX, NonZeroUsize::get);
    let searched = attacked.searched(most);
    let given = given(arguments)?;
    let others = arguments.others.iter().map(Evaluation::read).collect::<advtrain::Result<Vec<_>>>()?;
    let told = EvaluationInputs {
        settings: settings_name(arguments),
        files: files(arguments, [behaviors, targets], &utility)?,
        category: arguments.category.clone(),
        cases: attacked.cases.len(),
        left_out: attacked.left_out.clone(),
        notes: attacked.notes.clone(),
    };
    told.left_out.iter().for_each(|(id, why)| eprintln!("{id}: {why}"));
    told.notes.iter().for_each(|note| eprintln!("{note}"));
    Ok(Inputs { arguments, settings, place, attacked, searched, given, utility, others, told })
}

/// Prompts and answers of files, under the files' names.
fn given(arguments: &Arguments) -> Result<Vec<(String, Given)>> {
    let mut given = Vec::new();
    for path in &arguments.replay {
        given.push((format!("replay {}", stem(path)), Given::Prompts(load_test_cases(path)?)));
    }
    for path in &arguments.completions {
        given.push((format!("completions {}", stem(path)), Given::Answers(load_completions(path)?)));
    }
    Ok(given)
}

fn settings_name(arguments: &Arguments) -> String {
    let preset = arguments.preset.to_possible_value().map_or(String::new(), |value| value.get_name().to_string());
    let quick = if arguments.quick { ", quick" } else { "" };
    match &arguments.settings {
        Some(path) => path.display().to_string(),
        None => format!("preset {preset}{quick}"),
    }
}

fn files(arguments: &Arguments, [behaviors, targets]: [&PathBuf; 2], utility: &Utility) -> Result<Vec<InputFile>> {
    let mut named: Vec<(&str, &PathBuf)> = vec![("behaviors", behaviors), ("targets", targets)];
    named.extend(arguments.settings.iter().map(|path| ("settings", path)));
    named.extend(arguments.replay.iter().map(|path| ("replay", path)));
    named.extend(arguments.completions.iter().map(|path| ("completions", path)));
    let helpers = &arguments.helpers;
    named.extend(helpers.classifier_form.iter().map(|path| ("classifier form", path)));
    named.extend(helpers.scorer_form.iter().map(|path| ("scorer form", path)));
    named.extend(helpers.refusal_phrases.iter().map(|path| ("refusal phrases", path)));
    named.extend(utility.files.iter().map(|file| (file.kind.name(), &file.path)));
    Ok(named.into_iter().map(|(what, path)| InputFile::read(what, path)).collect::<advtrain::Result<_>>()?)
}

/// Evaluates all candidates, and reports on them and the others.
fn all(mut inputs: Inputs, candidates: Vec<Candidate>, out: &Path) -> Result<Finish> {
    check_names(&inputs.others, &candidates)?;
    let mut evaluations = Vec::new();
    let (mut problems, mut finish) = (Vec::new(), Finish::Completed);
    for candidate in &candidates {
        let ended = one(&inputs, candidate)?;
        problems.extend(ended.problems.into_iter().map(|problem| format!("{}: {problem}", candidate.name)));
        evaluations.push(ended.evaluation);
        finish = ended.finish;
        if finish == Finish::Stopped {
            break;
        }
    }
    let evaluations: Vec<Evaluation> = inputs.others.drain(..).chain(evaluations).collect();
    let mut report = Report::new(&evaluations);
    report.problems = problems;
    report.write(out, &evaluations).with_context(|| format!("writing the report into {}", out.display()))?;
    println!("{}", report.table());
    println!("report: {} and report.json beside it", out.join("report.html").display());
    if finish == Finish::Stopped {
        println!("stopped; the same command goes on from what is in {}", out.display());
    } else if !report.problems.is_empty() {
        bail!(
            "{} failed as a whole; the same command tries again: {}",
            report.problems.len(),
            report.problems.join("; ")
        );
    }
    Ok(finish)
}

/// Every model of a report has a name of its own.
fn check_names(others: &[Evaluation], candidates: &[Candidate]) -> Result<()> {
    let names = others.iter().map(|other| other.setup().model.as_str());
    let mut seen = HashSet::new();
    for name in names.chain(candidates.iter().map(|one| one.name.as_str())) {
        if !seen.insert(name) {
            bail!("two models of the report are called {name:?}; give this one another name with --name");
        }
    }
    Ok(())
}

fn one(inputs: &Inputs, candidate: &Candidate) -> Result<Ended> {
    let arguments = inputs.arguments;
    let format = chat_format(inputs, candidate)?;
    let config = DecoderConfig::read(&candidate.model)?;
    let tasks = tasks::read(&inputs.utility, &format, Framing::text_for(config.family), config.max_positions)?;
    tasks.notes.iter().for_each(|note| eprintln!("{note}"));
    let (kind, device) = (inputs.place.kind, inputs.place.device);
    let decoder = job::load_model(&candidate.model, candidate.adapter.as_deref(), kind, device)?;
    let frozen = decoder.frozen(false)?;
    let model = frozen.as_deref().unwrap_or(&decoder);
    let max_new_tokens = inputs.settings.max_new_tokens;
    let generation = Generation { max_new_tokens, end_ids: format.end_ids(), sampling: None };
    let subject = Subject::new(model, &format, generation, inputs.settings.rows)?.with_context(config.max_positions);
    let mut told = inputs.told.clone();
    told.notes.extend(tasks.notes.iter().cloned());
    let setup = Setup::of_model(&candidate.name, &decoder, candidate.adapter.as_deref(), &subject)?.with_inputs(told);
    let mut evaluation = Evaluation::open(&candidate.out, setup)?;
    if arguments.retry {
        evaluation.forget_failed()?;
    }
    plan(inputs, &mut evaluation, &subject, &tasks)?;
    let mut work = Work { inputs, subject: &subject, evaluation, problems: Vec::new() };
    let flow = work.run(tasks, watching::Bar::new(&candidate.name, &STOP)?);
    work.save_completions(&candidate.out);
    let finish = if flow.is_break() { Finish::Stopped } else { Finish::Completed };
    Ok(Ended { evaluation: work.evaluation, finish, problems: work.problems })
}

/// The chat format; for an adapter that was trained in another template than the folder's one must be named. A date that its
/// template prints stays that of the evaluation, and else is that of the first one beside it.
fn chat_format(inputs: &Inputs, candidate: &Candidate) -> Result<ChatFormat> {
    let format = match inputs.arguments.template {
        None => {
            refuse_other_template(candidate)?;
            ChatFormat::load(&candidate.model)?
        }
        Some(name) => ChatFormat::new(Tokenizer::load(&candidate.model)?, ChatTemplate::preset(name.into())?)?,
    };
    if !format.template().uses_clock() {
        return Ok(format);
    }
    let earlier = Setup::read(&candidate.out)?.and_then(|setup| setup.date);
    let beside = inputs.others.iter().find_map(|other| other.setup().date);
    let date = earlier.or(beside).unwrap_or(format.template().date());
    Ok(format.with_date(date))
}

/// The run that trained an adapter is in the folder around it.
fn refuse_other_template(candidate: &Candidate) -> Result<()> {
    let Some(run) = candidate.adapter.as_ref().map(|adapter| adapter.with_file_name("run.toml")) else { return Ok(()) };
    if !run.exists() {
        return Ok(());
    }
    match RunConfig::read(&run)?.model.template {
        Some(preset) => bail!(
            "{}: model.template = {preset:?}: the adapter was trained in it, and not in the model folder's; name one with \
             --template",
            run.display()
        ),
        None => Ok(()),
    }
}

/// Tells the evaluation all that it is to do, so that what cannot be done is found before anything begins. Helping
/// models are loaded one by one, and let go of again: together with the evaluated one they may not fit.
fn plan(inputs: &Inputs, evaluation: &mut Evaluation, subject: &Subject, tasks: &Tasks) -> Result<()> {
    let Inputs { arguments, settings, attacked, .. } = inputs;
    let assembly = inputs.assembly();
    let mut names = BTreeSet::new();
    let mut once = |name: String| {
        if names.contains(&name) {
            bail!("two attacks or judges are called {name:?}; rename one of the files, or name one of them only once");
        }
        names.insert(name);
        Ok(())
    };
    for name in &arguments.attacks {
        for attack in assembly.attacks(*name, subject)? {
            once(format!("attack {}", attack.name()))?;
            evaluation.plan_attack(&*attack, inputs.cases(*name))?;
        }
    }
    for (name, given) in &inputs.given {
        let (attack, unknown) = given.attack(name, settings, &attacked.cases)?;
        once(format!("attack {name}"))?;
        evaluation.plan_attack(&*attack, &attacked.cases)?;
        if !unknown.is_empty() {
            eprintln!("{name}: ids that are those of no case: {}", some_of(unknown.iter().map(String::as_str)));
        }
    }
    for name in assembly.judge_names() {
        let judge = assembly.judge(name)?;
        once(format!("judge {}", judge.name()))?;
        evaluation.plan_judge(&*judge)?;
    }
    tasks.tasks.iter().try_for_each(|task| evaluation.plan_task(&**task))?;
    Ok(())
}

/// One candidate's evaluation while it is made. What fails as a whole is noted and does not end the rest.
struct Work<'a> {
    inputs: &'a Inputs<'a>,
    subject: &'a Subject<'a>,
    evaluation: Evaluation,
    problems: Vec<String>,
}

impl Work<'_> {
    fn run(&mut self, tasks: Tasks, mut watch: watching::Bar) -> ControlFlow<()> {
        let inputs = self.inputs;
        let Inputs { arguments, settings, attacked, .. } = inputs;
        let assembly = inputs.assembly();
        let subject = self.subject;
        for name in &arguments.attacks {
            match assembly.attacks(*name, subject) {
                Ok(attacks) => {
                    attacks.into_iter().try_for_each(|attack| self.attack(attack, inputs.cases(*name), &mut watch))?
                }
                Err(error) => self.note(&format!("{name:?}"), &error),
            }
        }
        for (name, given) in &inputs.given {
            match given.attack(name, settings, &attacked.cases) {
                Ok((attack, _)) => self.attack(attack, &attacked.cases, &mut watch)?,
                Err(error) => self.note(name, &error),
            }
        }
        for name in assembly.judge_names() {
            match assembly.judge(name) {
                Ok(judge) => self.judge(judge, &mut watch)?,
                Err(error) => self.note(&format!("judge {name:?}"), &error),
            }
        }
        for mut task in tasks.tasks {
            let done = self.evaluation.measure(&mut *task, subject, &mut |at| watch.see(at));
            self.noted(&task.name(), done)?;
        }
        watch.finish();
        ControlFlow::Continue(())
    }

    fn attack(
        &mut self,
        mut attack: Box<dyn PromptAttack + '_>,
        cases: &[Case],
        watch: &mut watching::Bar,
    ) -> ControlFlow<()> {
        let done = self.evaluation.attack(&mut *attack, self.subject, cases, &mut |at| watch.see(at));
        self.noted(&attack.name(), done)
    }

    fn judge(&mut self, mut judge: Box<dyn Judge>, watch: &mut watching::Bar) -> ControlFlow<()> {
        let done = self.evaluation.judge(&mut *judge, &mut |at| watch.see(at));
        self.noted(&format!("judge {}", judge.name()), done)
    }

    fn noted(&mut self, what: &str, done: advtrain::Result<ControlFlow<()>>) -> ControlFlow<()> {
        done.unwrap_or_else(|error| {
            self.note(what, &error.into());
            ControlFlow::Continue(())
        })
    }

    fn note(&mut self, what: &str, error: &anyhow::Error) {
        eprintln!("{what} failed: {error:#}");
        self.problems.push(format!("{what}: {error:#}"));
    }

    /// What attacks by text offer, in HarmBench's forms.
    fn save_completions(&mut self, out: &Path) {
        let made = self.evaluation.attacks().iter().filter(|record| record.access == Access::Text);
        let names: BTreeSet<String> = made.map(|record| record.attack.clone()).collect();
        let mut written = HashMap::new();
        for name in names {
            let file = file_name(&name);
            if let Some(other) = written.insert(file.clone(), name.clone()) {
                let error = anyhow::anyhow!("would have the file of {other}; rename the replayed file");
                self.note(&format!("completions of {name}"), &error);
                continue;
            }
            let file = |folder: &str| out.join(folder).join(format!("{file}.json"));
            match save_completions(&self.evaluation, &name, file("test_cases"), file("completions")) {
                Ok(left_out) if left_out.is_empty() => {}
                Ok(left_out) => {
                    let ids = some_of(left_out.keys().map(String::as_str));
                    eprintln!("{name}: not among its completions, as the attack failed: {ids}");
                }
                Err(error) => self.note(&format!("completions of {name}"), &error.into()),
            }
        }
    }
}

fn file_name(attack: &str) -> String {
    attack.chars().map(|c| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}
