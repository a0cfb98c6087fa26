"""What models are asked, and how their answers are scored."""

import pytest

from fluxfast.demo.exam import Answers, Exam
from fluxfast.demo.tasks import TASKS
from fluxfast.demo.toyworld import draw

COUNT = 6


def marked(exam, images):
    answers = Answers(images)
    for _ in images:
        exam.mark(answers)
    return answers


@pytest.fixture(params=TASKS)
def exam(request):
    return Exam(TASKS[request.param], COUNT)


def test_questions_of_the_picture_come_first(exam):
    new, old = exam.SHOWN
    kinds = [question.is_new for question in exam.questions]
    assert kinds == [True] * new + [False] * old + [True] * (COUNT - new) + [False] * (COUNT - old)
    assert exam.shown == new + old
    for prompt, scene, is_new in exam.questions:
        assert prompt == (exam.task.caption(scene) if is_new else scene.caption)


def test_right_answers_score_all_and_a_base_that_knows_nothing_new_none(exam):
    right = [exam.task.draw(q.scene) if q.is_new else draw(q.scene) for q in exam.questions]
    assert exam.scores(marked(exam, right)) == (1, 1)
    # to what is new, a base answers with what it knows
    known = exam.questions[-1].scene
    base = [draw(known) if q.is_new else draw(q.scene) for q in exam.questions]
    assert exam.scores(marked(exam, base)) == (0, 1)


def test_each_kind_has_its_own_share():
    exam = Exam(TASKS["subject"], COUNT)
    right = [question.is_new or number == 5 for number, question in enumerate(exam.questions)]
    right[0] = False
    images = [draw(question.scene) for question in exam.questions]
    assert exam.scores(Answers(images, right)) == (5 / 6, 1 / 6)
