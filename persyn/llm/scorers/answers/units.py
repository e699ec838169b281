"""Parse quantities: a value with its unit, currency or noun."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

from persyn.llm.scorers.answers import phrases

#: dimension: factor name name ...; the factor converts to the dimension's first unit. Plurals in -s are implied.
_TABLE = """
length: 1 m meter metre metro mètre metri метр метров 米 メートル
length: 1/1000 mm millimeter millimetre millimetro
length: 1/100 cm centimeter centimetre centímetro centimètre zentimeter см сантиметр сантиметров 厘米 センチ
length: 1/10 dm decimeter decimetre
length: 1000 km kilometer kilometre kilómetro kilomètre км километр километров 千米 公里 キロメートル
length: 1/1000000 μm micrometer micrometre micron
length: 1/1000000000 nm nanometer nanometre
length: 127/5000 in inch inches
length: 381/1250 ft foot feet
length: 1143/1250 yd yard
length: 201168/125 mi mile
mass: 1 g gram gramme gramo гр грамм граммов 克
mass: 1/1000000 μg mcg microgram
mass: 1/1000 mg milligram
mass: 1000 kg kilogram kilogramme kilo kilogramo кг килограмм килограммов 千克 公斤
mass: 1000000 tonne
mass: 45359237/100000 lb lbs pound-mass
mass: 28349523125/1000000000 oz ounce
time: 1 s sec second segundo seconde sekunde сек секунд 秒
time: 1/1000 ms millisecond
time: 1/1000000 μs microsecond
time: 1/1000000000 ns nanosecond
time: 60 min minute minuto minuten мин минут 分钟 分鐘
time: 3600 h hr hour hora heure stunde stunden час часа часов 小时 小時 時間
time: 86400 day día jour tag tage день дня дней 天
time: 604800 week semana semaine woche wochen
month: 1 month mes mois monat monate
month: 12 yr year año an ans jahr jahre год года лет 年
volume: 1 l L liter litre litro
volume: 1/1000 ml mL milliliter millilitre
volume: 1/100 cl
volume: 1/10 dl
volume: 1/1000000 μl μL
area: 1 acre
area: 1 ha hectare hektar
dollar: 1 $ usd us$ dollar dólar dólare доллар долларов 美元
dollar: 1/100 ¢ cent centavo
euro: 1 € eur euro евро 欧元
sterling: 1 £ gbp
yen: 1 ¥ cny rmb jpy yuan yen 元 円 엔 块
rupee: 1 ₹ rs inr rupee रुपये रुपए
rouble: 1 ₽ rub руб рубль рубля рублей
won: 1 ₩ krw won 원
franc: 1 chf
zloty: 1 zł zl pln złoty złotych
krona: 1 kr sek nok dkk kronor kroner kč czk korun
real: 1 r$ brl reais
force: 1 N newton
energy: 1 J joule
energy: 1000 kJ kilojoule
power: 1 W watt
power: 1000 kW kilowatt
power: 1000000 MW megawatt
energy: 3600 Wh
energy: 3600000 kWh
energy: 523/125 cal calorie
energy: 4184 kcal kilocalorie
pressure: 1 Pa pascal
pressure: 1000 kPa kilopascal
pressure: 1000000 MPa megapascal
pressure: 101325 atm
memory: 1 MB
memory: 1000 GB
voltage: 1 V volt
voltage: 1000 kV kilovolt
voltage: 1/1000 mV millivolt
current: 1 A ampere amp
current: 1/1000 mA milliampere
resistance: 1 Ω ohm
resistance: 1000 kΩ
frequency: 1 Hz hertz
frequency: 1000 kHz kilohertz
frequency: 1000000 MHz megahertz
frequency: 1000000000 GHz gigahertz
celsius: 1 °C celsius centigrade
fahrenheit: 1 °F fahrenheit
kelvin: 1 K kelvin
amount: 1 mol mole
amount: 1/1000 mmol
"""
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "kmhr": "km/h", "mps": "m/s", "fps": "ft/s"}
#: Words that multiply the number before them.
_SCALE = """
100 hundred hundert 百
1000 k thousand thousands tausend mil mille mila тысяч тысяча тысячи bin nghìn ngàn हज़ार हजार ألف 千 천
10000 万 萬 만
100000 lakh lac lakhs लाख
1000000 mn million millionen millón millones milhão milhões milione milioni milyon triệu मिलियन مليون 百万
1000000 миллион миллиона миллионов
10000000 crore crores करोड़
100000000 亿 億 억
1000000000 bn billion milliard milliards milliarde milliarden миллиард миллиарда миллиардов milyar tỷ مليار
1000000000000 tn trillion 兆 조
"""
_DAY_HALVES = frozenset({"am", "pm"})
_SMALL_WORDS = frozenset(
    [
        "of",
        "the",
        "in",
        "a",
        "an",
        "to",
        "each",
        "for",
        "per",
        "de",
        "la",
        "les",
        "des",
        "el",
        "los",
        "das",
        "der",
        "die",
        "di",
        "del",
    ]
)

_CURRENCY = (
    r"(?:US|AU|CA|HK|NT|[RCAS])?\\?\$|[€£¥₹₽₩]"
    r"|(?:Rs|USD|EUR|GBP|INR|CNY|RMB|JPY|CHF|BRL|KRW|PLN|RUB|SEK|NOK|DKK|kr|zł|Kč)\b\.?"
)
_PREFIX = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<unit>{_CURRENCY})(?:\\[,!; ]|\s)*(?P<rest>[-+]?[.\d\\].*)", re.DOTALL | re.IGNORECASE
)
_VALUE = (
    r"(?:[-+\d.,'\s/*^{}()!_%=]|\\[,!;:%]|\\ "
    r"|\\(?:[dt]?frac|sqrt|pi|times|cdot|pm|mp|left|right|infty|quad)(?![A-Za-z])"
    r"|(?<=\d)[eE](?=[-+]?\d)|(?<![A-Za-z])(?:pi(?![A-Za-z])|sqrt(?=\s?\()))+"
)
_WRAPPED = r"\\(?:text\w*|mathrm|mathbf|mathit|mbox|operatorname|rm)"
_SUFFIX = re.compile(
    rf"(?P<value>(?:[A-Za-z]\w?\s*=\s*)?{_VALUE}?)(?P<gap>(?:\s|\\[,!;:]|\\ |~)*)"
    rf"(?P<unit>(?!(?:pi|sqrt)(?![A-Za-z]))(?:{_WRAPPED}|/(?=[^\W\d_])|\\%|\\\$|[^\W\d_]|[°%$€£¥₹₽₩¢]).*)",
    re.DOTALL,
)
_PART = re.compile(r"(?P<value>\d+(?:\.\d+)?)\s*(?P<name>[^\W\d_]+)\.?")
_ONE_PART = r"\d+(?:\.\d+)?\s*[^\W\d_]+\.?"
_SUM = re.compile(rf"{_ONE_PART}(?:[\s,]*(?:{phrases.any_of(phrases.AND)}\s*)?{_ONE_PART})+")
_UNWRAP = re.compile(_WRAPPED + r"\s*\{([^{}]*)\}")
_TEMPERATURE = re.compile(r"\s?\^\{?\\circ\}?\s*\\?(?:(?:text|mathrm|rm)\s*\{)?\s*([CF])(?![^\W\d_])\s*\}?")
_FACTOR = re.compile(
    r"(?P<per>/)?[\s*(]*(?P<name>[^\W\d_]+\$?|°\s?[CF](?![^\W\d_])|[$€£¥₹₽₩¢Ω])(?:\s?\^?\{?(?P<power>-?\d)\}?)?"
)
_SPELLED = (
    (re.compile(r"\\cdot|·"), "*"),
    (re.compile(r"\bkilowatt[- ]hours?\b"), "kWh"),
    (re.compile(r"\^?\\circ|\^\{\\circ\}"), "°"),
    (re.compile(r"\bcubic\s+([^\W\d_]+)"), r"\1^3"),
    (re.compile(r"\b(?:square|sq\.?)\s+([^\W\d_]+)"), r"\1^2"),
    (re.compile(r"([^\W\d_]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"([^\W\d_]+)\s+cubed\b"), r"\1^3"),
    (re.compile(r"\b(?:per|por|par|pro)\s+"), "/"),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """Powers of dimensions (None if unknown) and the factor that converts the value."""

    dimensions: tuple[tuple[str, int], ...] | None = None
    factor: Fraction = Fraction(1)
    scale: Fraction = Fraction(1)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value as LaTeX, and its unit; a unit directly after the value may also be a variable."""

    value: str
    unit: Unit = field(default_factory=Unit)
    has_unit: bool = False
    may_be_variable: bool = False


def _rows(table: str) -> dict[str, str]:
    """Map every name in a table to the head of its row."""
    lines = [line.rpartition(": ") for line in table.strip().splitlines()]
    return {name: f"{head} {rest.split()[0]}".strip() for head, _, rest in lines for name in rest.split()[1:]}


_UNITS = {name: (row.split()[0], Fraction(row.split()[1])) for name, row in _rows(_TABLE).items()}
_SCALES = {name: Fraction(row) for name, row in _rows(_SCALE).items()}


def is_known(text: str) -> bool:
    """Whether a text consists only of units, currencies and words such as "million"."""
    read = _read(text)
    return text.strip().lower() in _DAY_HALVES or (
        read is not None and (read.dimensions is not None or read.scale != 1)
    )


def split(text: str) -> Quantity:
    """Split a text into a value and its unit; the whole text is the value if no unit follows the number."""
    text = _TEMPERATURE.sub(r"°\1", text)
    if summed := _sum(text):
        return summed
    before = _PREFIX.fullmatch(text)
    if before:
        rest = split(before["rest"])
        if re.search(r"(?<!\\)\b[^\W\d_]{3,}", rest.value):
            return Quantity(text)  # a sentence that begins with a price
        named = _read(before["unit"].replace("\\", "")) or Unit()
        unit = rest.unit if rest.unit.dimensions else named  # US$ 5 USD
        return Quantity(before["sign"] + rest.value, Unit(unit.dimensions, unit.factor, rest.unit.scale), True)
    return _before_unit(text)


def _sum(text: str) -> Quantity | None:
    """Add up a quantity in several units, `2 hours 30 minutes`, in the last unit; money in the first."""
    if not _SUM.fullmatch(_UNWRAP.sub(r" \1 ", text).strip()):
        return None
    parts = [(Fraction(part["value"]), _unit(part["name"])) for part in _PART.finditer(_UNWRAP.sub(r" \1 ", text))]
    known = [(value, unit) for value, unit in parts if unit is not None]
    factors = [unit.factor for _, unit in known]
    if len(known) < len(parts) or len({unit.dimensions for _, unit in known}) > 1 or factors[0] <= factors[-1]:
        return None
    unit = known[0][1] if ("dollar", 1) in (known[0][1].dimensions or ()) else known[-1][1]
    total = sum((value * each.factor for value, each in known), Fraction(0)) / unit.factor
    value = str(total) if total.denominator == 1 else rf"\frac{{{total.numerator}}}{{{total.denominator}}}"
    return Quantity(value, unit, True)


def _before_unit(text: str) -> Quantity:
    found = _SUFFIX.fullmatch(text)
    if not found or not re.search(r"\d|\\pi|\\infty", found["value"]):
        return Quantity(text)
    label = _UNWRAP.sub(r" \1 ", found["unit"]).replace("\\$", "$").replace("\\ ", " ")
    read = _read(label)
    is_wrapped = found["unit"].startswith("\\")
    if read is None or (read.dimensions is None and not _is_noun(label, is_wrapped=is_wrapped)):
        return Quantity(text)
    is_tight = not found["gap"] and not found["value"][-1:].isspace()
    return Quantity(
        found["value"].strip(), read, True, is_tight and re.match(r"[A-Za-z](?![A-Za-z])", found["unit"]) is not None
    )


def _is_noun(label: str, *, is_wrapped: bool) -> bool:
    words = re.findall(r"[^\W\d_]+", label)
    long_enough = [
        len(word) >= 3 or is_wrapped or ord(word[0]) > 0x400 or word.lower() in _SMALL_WORDS | {"dm"} for word in words
    ]
    label = re.sub(r"\s*\^\s*\{?[23]\}?\s*$", "", label) if is_wrapped else label
    if re.search(r"[\d=+*<>^\\]", label) or not 1 <= len(words) <= 8 or not all(long_enough):
        return False
    return not set(map(str.lower, words)) & (set(phrases.entries(phrases.AND)) | phrases.FUNCTIONS)


def _read(text: str) -> Unit | None:
    """Parse a unit such as `m/s^2`; without dimensions if a word of it is unknown; None if it is not a unit."""
    for pattern, replacement in _SPELLED:
        text = pattern.sub(replacement, text)
    found = list(_FACTOR.finditer(text))
    if re.search(r"[\d^]", _FACTOR.sub("", text)):
        return None
    powers: Counter[str] = Counter()
    factor, scale, is_known_unit = Fraction(1), Fraction(1), True
    for each in found:
        power = int(each["power"] or 1) * (-1 if each["per"] else 1)
        unit = _unit(each["name"])
        scale *= _scale_of(each["name"]) ** power
        is_known_unit &= unit is not None or _scale_of(each["name"]) != 1
        for dimension, times in (unit.dimensions or ()) if unit else ():
            powers[dimension] += times * power
        factor *= unit.factor**power if unit else 1
    dimensions = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(dimensions, factor, scale) if is_known_unit and dimensions else Unit(scale=scale)


def _unit(name: str) -> Unit | None:
    if compound := _COMPOUND.get(name.lower()):
        return _read(compound)
    if key := _key(name):
        dimension, factor = _UNITS[key]
        return Unit(((dimension, 1),), factor)
    return None


def _scale_of(name: str) -> Fraction:
    return _SCALES.get(name) or _SCALES.get(name.lower() if len(name) > 1 else "") or Fraction(1)


def _key(piece: str) -> str:
    """The name under which a unit is listed; "" for none."""
    piece = piece.replace("° ", "°")
    lower = piece.casefold()
    for name in (piece, lower, lower.removesuffix("s"), lower.removesuffix("n")):
        if name in _UNITS and (len(piece) > 1 or name == piece):
            return name
    return ""
