#include "embeddings.h"

#include <stdexcept>

namespace lowrank::cpu {

namespace {

int64_t checked(int64_t row, Table const& table, char const* what) {
    if (row < 0 || row >= table.rows)
        throw std::out_of_range(std::string(what) + " " + std::to_string(row) + " of " + std::to_string(table.rows));
    return row;
}

}  // namespace

bool Embeddings::fit(int width) const {
    bool const word = up ? words.width == up->in() && up->out() == width : words.width == width;
    return word && positions.width == width && (types.rows == 0 || types.width == width);
}

void Embeddings::find(Ids const& ids, int count, std::vector<Token>& tokens) const {
    int64_t next = padding + 1;
    for (int i = 0; i < count; ++i) {
        int64_t const word = checked(ids.words[i], words, "token id");
        int64_t const position = checked(word == padding ? padding : next++, positions, "position");
        Token token{};
        if (words.codes != nullptr)
            token.codes = words.codes + word * words.width, token.scale = words.scale[word];
        else
            token.word = words.floats + word * words.width;
        token.position = positions.floats + position * positions.width;
        if (types.rows > 0)
            token.type = types.floats + checked(ids.types == nullptr ? 0 : ids.types[i], types, "token type") * types.width;
        tokens.push_back(token);
    }
}

}  // namespace lowrank::cpu
