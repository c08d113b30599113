"""Words of other languages for multilingual pretraining.

None of them is English. In domain: the digits, as in the target. Out of
domain: days of the week and months.
"""

DOMAINS = {
    "in_domain": {
        "de": "null eins zwei drei vier fünf sechs sieben acht neun",
        "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
        "it": "zero uno due tre quattro cinque sei sette otto nove",  # codespell:ignore
        "nl": "nul een twee drie vier vijf zes zeven acht negen",
        "pl": "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć",
        "pt": "zero um dois três quatro cinco seis sete oito nove",
    },
    "out_of_domain": {
        "de": "montag dienstag mittwoch donnerstag freitag samstag sonntag "
        "januar februar märz",  # codespell:ignore
        "es": "lunes martes miércoles jueves viernes sábado domingo enero "
        "febrero marzo",
        "it": "lunedì martedì mercoledì giovedì venerdì sabato domenica "
        "gennaio febbraio marzo",
        "nl": "maandag dinsdag woensdag donderdag vrijdag zaterdag zondag "
        "januari februari maart",
        "pl": "poniedziałek wtorek środa czwartek piątek sobota niedziela "
        "styczeń luty marzec",
        "pt": "segunda terça quarta quinta sexta sábado domingo janeiro "
        "fevereiro março",
    },
}


def words_of(domain, language):
    """Return the ten words of a domain in a language (espeak-ng's code)."""
    table = DOMAINS.get(domain, {})
    if language not in table:
        raise ValueError(
            f"no words of {language!r} for {domain!r}; there are "
            f"{', '.join(DOMAINS)} in {', '.join(DOMAINS['in_domain'])}. Add "
            "them in words.py"
        )
    return table[language].split()
