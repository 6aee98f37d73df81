use std::collections::VecDeque;
use std::sync::Arc;

use ctxserve_backend::KvPlan;
use futures_util::{FutureExt, StreamExt};
use proptest::prelude::*;

use super::*;
use crate::queue::Occupancy;
use crate::shared::Submission;
use crate::testing::{Answer, Moody, PagedEchoRunner, VOCAB, expected, request, spec};
use crate::{EventStream, Runner};

/// One request of a scenario; steps count scheduler steps.
#[derive(Clone, Debug)]
struct Job {
    arrives: usize,
    prompt: usize,
    max_tokens: usize,
    min_tokens: usize,
    cancelled: Option<usize>,
    /// Stop ids beside the end-of-turn id.
    stops: u32,
    penalised: bool,
    /// Has a constraint that is settled after so many tokens.
    guided: Option<usize>,
    /// Begins with so many tokens of an earlier job's prompt and answer, which is that many jobs before.
    follows: Option<(usize, usize)>,
    salted: bool,
}

#[derive(Clone, Debug)]
struct Scenario {
    page_size: usize,
    window: Option<usize>,
    max_num_seqs: usize,
    max_batched_tokens: usize,
    max_model_len: usize,
    /// Pages beyond what one sequence needs: 0 is the greatest pressure.
    spare: usize,
    /// Most steps in flight.
    depth: usize,
    /// Whether prompts that begin alike share pages.
    caching: bool,
    /// When the prefix cache is reset.
    reset: Option<usize>,
    jobs: Vec<Job>,
}

fn scenarios() -> impl Strategy<Value = Scenario> {
    let ends = (1_usize..30, 0_usize..6, 0_u32..8, prop::option::weighted(0.3, 0_usize..80));
    let modes = (prop::bool::weighted(0.1), prop::option::weighted(0.3, 0_usize..40));
    let shared = (prop::option::weighted(0.7, (1_usize..4, 0_usize..90)), prop::bool::weighted(0.1));
    let job = (0_usize..40, 1_usize..60, ends, modes, shared);
    let job =
        job.prop_map(|(arrives, prompt, (max_tokens, min_tokens, stops, cancelled), modes, shared)| Job {
            follows: shared.0,
            salted: shared.1,
            arrives,
            prompt,
            max_tokens,
            min_tokens,
            cancelled: cancelled.map(|after| arrives + after),
            stops,
            penalised: modes.0,
            guided: modes.1,
        });
    let sizes =
        (1_usize..7, prop::option::of(1_usize..14), 1_usize..7, 1_usize..30, 2_usize..64, 0_usize..30);
    let how = (1_usize..4, prop::bool::weighted(0.8), prop::option::weighted(0.1, 5_usize..60));
    (sizes, how, prop::collection::vec(job, 1..14)).prop_map(|(sizes, (depth, caching, reset), mut jobs)| {
        let (page_size, window, max_num_seqs, max_batched_tokens, max_model_len, spare) = sizes;
        jobs.sort_by_key(|job| job.arrives);
        jobs.iter_mut().for_each(|job| job.prompt = job.prompt.min(max_model_len - 1));
        Scenario {
            page_size,
            window,
            max_num_seqs,
            max_batched_tokens,
            max_model_len,
            spare,
            depth,
            caching,
            reset,
            jobs,
        }
    })
}

/// A scheduler and a runner in lock step, without a thread.
struct Bench {
    scenario: Scenario,
    scheduler: Scheduler,
    runner: PagedEchoRunner,
    in_flight: VecDeque<Launched>,
    /// What constraints were asked and have not answered.
    questions: Vec<Question>,
    occupancy: Arc<Occupancy>,
    /// By key; `None` once cancelled.
    streams: Vec<Option<EventStream>>,
    answers: Vec<Answer>,
    steps: usize,
}

impl Bench {
    fn new(scenario: &Scenario) -> Self {
        let spec = spec(scenario.page_size, scenario.window);
        let (len, chunk) = (scenario.max_model_len, scenario.max_batched_tokens);
        let pages = |g| spec.pages_for(g, len, chunk.min(len)) + scenario.spare;
        let plan = KvPlan { pages: (0..spec.groups.len()).map(pages).collect(), spec: spec.clone() };
        let mut runner = PagedEchoRunner::new(spec, len, scenario.depth);
        runner.allocate(&plan).unwrap();
        let limits = Limits { max_num_seqs: scenario.max_num_seqs, max_batched_tokens: chunk, vocab: VOCAB };
        Self {
            scenario: scenario.clone(),
            scheduler: Scheduler::new(limits, KvPools::new(&plan, scenario.caching)),
            runner,
            in_flight: VecDeque::new(),
            questions: Vec::new(),
            occupancy: Arc::default(),
            streams: Vec::new(),
            answers: Vec::new(),
            steps: 0,
        }
    }

    fn request(&self, key: usize) -> ctxserve_core::GenerateRequest {
        let job = &self.scenario.jobs[key];
        let mut prompt: Vec<_> = (0..job.prompt).map(|at| ((key * 31 + at * 7) % VOCAB) as u32).collect();
        if let Some((before, tokens)) = job.follows.filter(|(before, _)| *before <= key) {
            let other = self.request(key - before);
            let answer = expected(self.scheduler.pools().spec(), &other, self.scenario.max_model_len);
            let common = other.prompt.iter().chain(&answer.tokens).take(tokens);
            prompt.splice(..0, common.copied());
            prompt.truncate(self.scenario.max_model_len - 1);
        }
        let mut request = request(key as u64, &prompt, job.max_tokens);
        request.sampling.min_tokens = job.min_tokens;
        request.sampling.presence_penalty = if job.penalised { 0.5 } else { 0.0 };
        request.stop.token_ids = (1..=job.stops).collect();
        request.guide = job.guided.map(Moody::guide);
        request.salt = job.salted.then(|| "tenant".into());
        request
    }

    fn submit(&mut self, key: usize) {
        let (events, stream) = EventStream::channel();
        let request = self.request(key);
        let ticket = self.occupancy.enter(request.prompt.len());
        let limit = request.max_tokens.min(self.scenario.max_model_len - request.prompt.len());
        let submission = Submission { key: key as u64, request, limit, events, ticket };
        self.scheduler.push(Sequence::new(submission, self.scheduler.pools().lease(), 0, VOCAB));
        self.streams.push(Some(stream));
        self.answers.push(Answer::default());
    }

    /// The invariants that hold between steps.
    fn check(&self) {
        let Scheduler { running, waiting, ending, pools, .. } = &self.scheduler;
        assert_eq!(self.scheduler.check(), Ok(()));
        let keys: Vec<_> = running.iter().chain(waiting).map(Sequence::key).collect();
        assert!(keys.is_sorted_by(|a, b| a < b), "out of order: {keys:?}");
        assert!(ending.iter().all(Sequence::is_ending) && running.iter().all(|s| !s.is_ending()));
        for group in 0..pools.used().len() {
            let held: usize = running.iter().map(|sequence| sequence.kv().held(group)).sum();
            assert!(held >= pools.used()[group], "a page outside the running sequences");
            assert!(self.scenario.caching || held == pools.used()[group], "a page in two tables");
            for sequence in running {
                let most = pools.spec().pages_for(group, sequence.len(), 1);
                assert!(sequence.kv().held(group) <= most, "more than the window is held");
            }
        }
    }

    /// What the driver does between two looks at its inbox.
    fn step(&mut self) {
        let Scheduler { running, waiting, .. } = &self.scheduler;
        let oldest = running.iter().chain(waiting).min_by_key(|sequence| sequence.key());
        let oldest = oldest.map(|s| (s.key(), s.in_flight() > 0 || s.is_held()));
        self.questions.extend(self.scheduler.take_questions());
        // Constraints take their time.
        if !self.steps.is_multiple_of(3) {
            self.advise();
        }
        let step = self.scheduler.schedule();
        assert_eq!(self.scheduler.check(), Ok(()));
        let wait = step.is_empty();
        if !wait {
            let (key, preempted) = oldest.unwrap();
            let batch = self.launch(step);
            let served = batch.sequences.iter().any(|slice| slice.key == key);
            assert!(served || preempted, "the oldest sequence, {key}, has no row");
        }
        if wait && self.in_flight.is_empty() {
            assert!(!self.questions.is_empty(), "nothing to do");
            self.advise();
        } else if wait || self.in_flight.len() >= self.scenario.depth {
            self.collect();
        }
    }

    fn advise(&mut self) {
        for question in std::mem::take(&mut self.questions) {
            self.scheduler.guide(question.answer()).into_iter().for_each(Ending::send);
        }
    }

    fn launch(&mut self, step: Step) -> Batch {
        let mut batch = Batch::default();
        self.scheduler.describe(&step, &mut batch);
        assert!(batch.tokens.len() <= self.scenario.max_batched_tokens, "over the token budget");
        assert!(batch.sequences.len() <= self.scenario.max_num_seqs, "over the sequence limit");
        for slice in &batch.sequences {
            let Some(row) = slice.sample.as_ref().filter(|row| row.params.has_penalties()) else { continue };
            assert_eq!(row.generated.len() as u64, row.step, "penalties need all that was generated");
        }
        assert!(batch.sequences.iter().all(|slice| {
            let masked = slice.sample.as_ref().is_some_and(|row| row.mask.is_some());
            !(masked && slice.feed.is_some())
        }));
        self.runner.launch(&batch).unwrap();
        self.in_flight.push_back(self.scheduler.launched(step));
        self.steps += 1;
        batch
    }

    fn collect(&mut self) {
        let step = self.in_flight.pop_front().expect("nothing to do");
        let outcomes = self.runner.collect().unwrap();
        assert_eq!(outcomes.len(), step.rows());
        self.scheduler.commit(step, outcomes).into_iter().for_each(Ending::send);
    }

    fn read(&mut self) {
        for (stream, answer) in self.streams.iter_mut().zip(&mut self.answers) {
            let Some(stream) = stream else { continue };
            while let Some(Some(event)) = stream.next().now_or_never() {
                answer.take(event);
            }
        }
    }

    /// Plays the scenario to its end.
    fn play(&mut self) {
        // Steps to compute everything one row at a time, with every preemption that the ages allow.
        let most = 200_000;
        let mut now = 0;
        loop {
            for key in 0..self.scenario.jobs.len() {
                if self.scenario.jobs[key].arrives == now {
                    self.submit(key);
                }
                if self.scenario.jobs[key].cancelled == Some(now) {
                    self.streams[key] = None;
                }
            }
            self.scheduler.drop_cancelled();
            if self.scenario.reset == Some(now) {
                self.scheduler.pools().reset();
            }
            self.check();
            if !(self.scheduler.is_idle() && self.in_flight.is_empty()) {
                self.step();
                self.read();
                self.check();
            } else if self.streams.len() == self.scenario.jobs.len() {
                return;
            }
            now += 1;
            assert!(now < most, "no end in sight");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Random arrivals, cancellations, stops, lengths, windows, chunk sizes, page pressure and steps in flight: every
    /// step keeps its budgets and serves the oldest, no page is lost, nobody is starved, and every answer that was
    /// not cancelled is the one of the sequence alone.
    #[test]
    fn everyone_is_answered_as_if_alone(scenario in scenarios()) {
        let mut bench = Bench::new(&scenario);
        bench.play();
        prop_assert!(bench.scheduler.pools.used().iter().all(|&used| used == 0));
        prop_assert_eq!((bench.occupancy.sequences(), bench.occupancy.queued_tokens()), (0, 0));
        let spec = spec(scenario.page_size, scenario.window);
        for key in 0..scenario.jobs.len() {
            let whole = expected(&spec, &bench.request(key), scenario.max_model_len);
            let answer = &bench.answers[key];
            if bench.streams[key].is_some() {
                prop_assert_eq!(answer.clone().plain(), whole, "sequence {}", key);
            } else {
                prop_assert!(whole.tokens.starts_with(&answer.tokens), "sequence {} before its end", key);
            }
        }
    }
}

fn job(arrives: usize, prompt: usize, max_tokens: usize) -> Job {
    Job {
        arrives,
        prompt,
        max_tokens,
        min_tokens: max_tokens,
        cancelled: None,
        stops: 0,
        penalised: false,
        guided: None,
        follows: None,
        salted: false,
    }
}

#[test]
fn page_pressure_preempts_the_youngest_and_repeats_nothing() {
    (1..4).for_each(page_pressure);
}

fn page_pressure(depth: usize) {
    let scenario = Scenario {
        depth,
        caching: false,
        reset: None,
        page_size: 4,
        window: None,
        max_num_seqs: 4,
        max_batched_tokens: 16,
        max_model_len: 40,
        spare: 2,
        jobs: (0..4).map(|_| job(0, 6, 30)).collect(),
    };
    let mut bench = Bench::new(&scenario);
    bench.play();
    let counters = bench.scheduler.counters();
    assert!(counters.preemptions > 0, "the pool was meant to be too small");
    assert_eq!(counters.prompt_tokens, 4 * 6, "a preempted prompt is counted once");
    assert_eq!(counters.generation_tokens, 4 * 30);
    for answer in &bench.answers {
        assert_eq!((answer.admitted, answer.tokens.len()), (1, 30));
    }
}

/// OPS-15: every step of a long prompt has a row for those who decode.
#[test]
fn decode_rows_flow_beside_a_long_prompt() {
    let scenario = Scenario {
        page_size: 4,
        window: Some(8),
        max_num_seqs: 3,
        max_batched_tokens: 8,
        max_model_len: 200,
        spare: 100,
        depth: 1,
        caching: false,
        reset: None,
        jobs: vec![job(0, 2, 60), job(0, 2, 60), job(2, 150, 1)],
    };
    let mut bench = Bench::new(&scenario);
    bench.submit(0);
    bench.submit(1);
    bench.step();
    bench.submit(2);
    // 150 prompt tokens beside two decode rows: chunks of 6.
    for step in 0..150 / 6 {
        let plan = bench.scheduler.schedule();
        let batch = bench.launch(plan);
        let rows: Vec<_> = batch.sequences.iter().map(|slice| (slice.key, slice.rows.len())).collect();
        assert_eq!(rows, [(0, 1), (1, 1), (2, 6)], "step {step}");
        let sampled: Vec<_> = batch.sequences.iter().map(|slice| slice.sample.is_some()).collect();
        assert_eq!(sampled, [true, true, step == 24], "only a prompt's last chunk is sampled");
        bench.collect();
        bench.check();
    }
    bench.read();
    assert_eq!(bench.answers[2].tokens.len(), 1);
    assert_eq!(bench.answers[0].tokens.len(), 26);
}

#[test]
fn a_newcomer_waits_until_its_whole_prompt_fits() {
    let scenario = Scenario {
        page_size: 4,
        window: None,
        max_num_seqs: 4,
        max_batched_tokens: 8,
        max_model_len: 40,
        spare: 0,
        depth: 1,
        caching: false,
        reset: None,
        jobs: vec![job(0, 30, 2), job(0, 20, 2), job(0, 1, 2)],
    };
    let mut bench = Bench::new(&scenario);
    (0..3).for_each(|key| bench.submit(key));
    for _ in 0..4 {
        bench.step();
        assert_eq!(bench.scheduler.running(), 1, "the second prompt cannot fit, the third may not overtake");
    }
    while !bench.scheduler.is_idle() {
        bench.step();
        bench.read();
    }
    assert_eq!(bench.scheduler.counters().preemptions, 0);
    assert!(bench.answers.iter().all(|answer| answer.tokens.len() == 2));
}

mod ahead;
mod guided;
mod prefix;
